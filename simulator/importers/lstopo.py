"""``lstopo FILE.xml`` (hwloc 1 and 2): packages, PCIe bridges, GPUs, with the rate of each link.

hwloc states one rate a link, GB/s as trained *now*: an idle GPU may show less than under load. NVLinks
are not read from it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from simulator.importers.machine import Card, Kind, Machine, Pcie, Reading, Vertex, pci_address
from simulator.importers.reading import Element, Report, number, parse_xml

_NVIDIA = "[10de:"
_SOCKETS = ("Machine", "Package", "Socket", "NUMANode")


def read_lstopo(report: Report) -> Machine:
    """The machine of an hwloc XML. Raises ConfigError."""
    root = parse_xml(report)
    if root.tag != "topology":
        what = f"root element <{root.tag}>, allowed: <topology>, as lstopo FILE.xml writes it"
        raise report.error(root.line, what)
    reader = _Reader(report)
    for child in root.children:
        reader.below(child, None)
    if not reader.gpus:
        what = "no NVIDIA GPU in it, allowed: lstopo of the machine with its PCI devices"
        raise report.error(root.line, what + " (lstopo --whole-io)")
    return reader.machine(root.line)


class _Reader:
    """Walks <object> elements. A GPU is a PCI device of class 03 by NVIDIA; it is numbered as NVML
    or CUDA number it where hwloc says so, by bus id otherwise."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.vertices: list[Vertex] = []
        self.gpus: list[tuple[int, str, str]] = []
        self.cards: dict[str, Card] = {}
        self.infos: dict[str, str] = {}
        self.nics: list[tuple[str, Reading | None]] = []

    def below(self, element: Element, parent: str | None) -> None:
        """``element`` and what it holds; ``parent`` is the nearest vertex above."""
        kind = element.attributes.get("type", "")
        here = parent
        for info in (c.attributes for c in element.children if c.tag == "info"):
            self.infos.setdefault(info.get("name", ""), info.get("value", ""))
        if kind in _SOCKETS and (kind != "Machine" or _holds_io(element)):
            here = self._add("socket", "socket", parent, element)
        elif kind == "Group" and _holds_io(element):
            here = self._add("rc", "root", parent, element)
        elif kind == "Bridge" and element.attributes.get("bridge_type", "").startswith("1"):
            here = self._add("plx", "switch", parent, element)
        elif kind == "PCIDev":
            self._device(element, parent)
        for child in element.children:
            if child.tag == "object":
                self.below(child, here)

    def _device(self, element: Element, parent: str | None) -> None:
        pci_type = element.attributes.get("pci_type", "")
        inner = [c.attributes.get("name", "") for c in element.children if c.tag == "object"]
        if pci_type.startswith("02"):
            self.nics += [(name, None) for name in inner[:1]]
        if not pci_type.startswith("03") or _NVIDIA not in pci_type.lower():
            return
        busid = element.attributes.get("pci_busid", "")
        index = [int(n[4:]) for n in inner if n[:4] in ("nvml", "cuda") and n[4:].isdecimal()]
        name = f"pci {busid}"
        model = re.search(r"\[(.+)\]", element.attributes.get("name", ""))  # AD102GL [L40S]
        self.cards[name] = Card(
            model=model[1] if model else "",
            address=pci_address(busid),
            at=self.report.at(element.line),
        )
        self.gpus.append((index[0] if index else -1, busid, name))
        self.vertices.append(
            Vertex(
                name=name, kind="gpu", parent=parent, at=self.report.at(element.line),
                pcie=self._pcie(element),
            )
        )  # fmt: skip

    def _add(self, prefix: str, kind: Kind, parent: str | None, element: Element) -> str:
        name = f"{prefix}{sum(v.name.startswith(prefix) for v in self.vertices)}"
        pcie = self._pcie(element) if kind == "switch" else None
        at = self.report.at(element.line)
        self.vertices.append(Vertex(name=name, kind=kind, parent=parent, at=at, pcie=pcie))
        return name

    def _pcie(self, element: Element) -> Pcie | None:
        text = element.attributes.get("pci_link_speed", "0")
        rate = number(self.report, element.line, text, "pci_link_speed") * 1e9
        return Pcie(bytes_per_s=rate, at=self.report.at(element.line)) if rate else None

    def machine(self, line: int) -> Machine:
        """All that was read; sockets are the outermost vertices, what is inside them is a root."""
        order = {name: f"gpu{i}" for i, (_, _, name) in enumerate(sorted(self.gpus))}
        kept = []
        for v in self.vertices:
            nested: Kind = "root" if v.kind == "socket" and v.parent is not None else v.kind
            kept.append(replace(v, name=order.get(v.name, v.name), kind=nested))
        cards = {i: self.cards[name] for i, (_, _, name) in enumerate(sorted(self.gpus))}
        vendor, model = (self.infos.get(key, "") for key in ("CPUVendor", "CPUModelNumber"))
        return Machine(
            vertices=tuple(kept),
            nvlinks=(),
            at=self.report.at(line),
            cpu=(vendor, int(model) if model.isdecimal() else -1) if vendor else None,
            nics=tuple(self.nics),
            cards=cards,
            tells_nvlinks=False,
        ).pruned()


def _holds_io(element: Element) -> bool:
    """Whether PCI hangs directly on this object, and not on a socket or a group inside it."""
    return any(c.attributes.get("type") == "Bridge" for c in element.children)
