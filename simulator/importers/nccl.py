"""NCCL's own view of a machine: the topology XML (NCCL_TOPO_DUMP_FILE) and the GRAPH lines of its log.

The XML names every PCIe bridge with the speed and width that its link can train to, every GPU with its
NVLinks and their far ends, and every adapter with its rate: the best single source of a tree. The log
(NCCL_DEBUG=INFO, NCCL_DEBUG_SUBSYS=INIT,GRAPH) has the same tree with NCCL's nominal rates, and says
which pairs talk peer to peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from simulator.importers.machine import (
    GT_PER_S,
    Card,
    Kind,
    Machine,
    Nvlinks,
    Pair,
    Pcie,
    Reading,
    Vertex,
    pci_address,
    pcie_bytes_per_s,
)
from simulator.importers.reading import Element, Report, number, parse_xml

NVSWITCH_CLASS, GPU_CLASS = "0x0680", "0x03"
"""PCI classes of an NVLink's far end: bridge (an NVSwitch), display controller (a GPU)."""
NCCL_PCIE = pcie_bytes_per_s(3, 16) / 12e9
"""NCCL counts 12 GB/s for a PCIe 3 x16 link and scales the others (src/graph/topo.cc, ncclTopoGetPciBw);
after line coding it carries 15.75."""


def read_xml(report: Report) -> Machine:
    """The machine of a topology XML. Raises ConfigError."""
    root = parse_xml(report)
    if root.tag != "system":
        what = f"root element <{root.tag}>, allowed: <system>, as NCCL_TOPO_DUMP_FILE writes it"
        raise report.error(root.line, what)
    reader = _XmlReader(report, root)
    for index, cpu in enumerate(c for c in root.children if c.tag == "cpu"):
        reader.cpu(cpu, index)
    if not reader.devices:
        raise report.error(root.line, "no <gpu> in it, allowed: a dump of a run with GPUs")
    return reader.machine()


class _XmlReader:
    """Walks <cpu>, <pci>, <gpu>, <nic>; GPUs are numbered by their ``dev``."""

    def __init__(self, report: Report, root: Element) -> None:
        self.report = report
        self.root = root
        self.vertices: list[Vertex] = []
        self.nvlinks: list[tuple[int, Element]] = []
        self.nics: list[tuple[str, Reading | None]] = []
        self.cpu_model: tuple[str, int] | None = None
        self.devices: dict[int, int] = {}
        for gpu in (e for e in root.walk() if e.tag == "gpu"):
            dev = int(number(report, gpu.line, gpu.attributes.get("dev", ""), "<gpu dev>"))
            if dev in self.devices:
                raise report.error(gpu.line, f"second <gpu> with dev {dev}, allowed: one machine")
            self.devices[dev] = gpu.line
        self.order = sorted(self.devices)
        self.busids: dict[str, int] = {}
        self.cards: dict[int, Card] = {}

    def cpu(self, cpu: Element, index: int) -> None:
        vendor, model = cpu.attributes.get("vendor", ""), cpu.attributes.get("modelid", "")
        if vendor and model.isdecimal():
            self.cpu_model = (vendor, int(model))
        name = f"socket{index}"
        self._add(name, "socket", None, cpu.line)
        self._below(cpu, name)

    def _below(
        self, element: Element, parent: str, link: Pcie | None = None, busid: str = ""
    ) -> None:
        """``link`` is that of the <pci> element itself, which a GPU in it has for its own."""
        for child in element.children:
            if child.tag == "pci":
                at = child.attributes.get("busid", "").lower()
                own = self._pcie(child)
                inner = any(c.tag == "pci" for c in child.children)
                name = f"plx{sum(v.kind == 'switch' for v in self.vertices)}"
                if inner:
                    self._add(name, "switch", parent, child.line, own)
                self._below(child, name if inner else parent, own, at)
            elif child.tag == "gpu":
                index = self.order.index(int(child.attributes["dev"]))
                self._add(f"gpu{index}", "gpu", parent, child.line, link)
                self.busids[busid] = index
                at = self.report.at(child.line)
                self.cards[index] = Card(model="", address=pci_address(busid), at=at)
                self.nvlinks += [(index, c) for c in child.children if c.tag == "nvlink"]
            elif child.tag == "nic":
                self.nics += [self._net(c) for c in child.children if c.tag == "net"]

    def _net(self, net: Element) -> tuple[str, Reading | None]:
        name, speed = net.attributes.get("name", "net"), net.attributes.get("speed")
        if speed is None:
            return name, None
        mbit = number(self.report, net.line, speed, f"<net {name} speed>")
        return name, Reading(mbit * 1e6 / 8, self.report.at(net.line))

    def _add(
        self, name: str, kind: Kind, parent: str | None, line: int, pcie: Pcie | None = None
    ) -> None:
        at = self.report.at(line)
        self.vertices.append(Vertex(name=name, kind=kind, parent=parent, at=at, pcie=pcie))

    def _pcie(self, pci: Element) -> Pcie | None:
        """The link above a <pci>. Virtual machines leave speed and width empty: None."""
        speed, width = pci.attributes.get("link_speed", ""), pci.attributes.get("link_width", "")
        if not speed or not width or speed.lower().startswith("unknown"):
            return None
        rate = number(self.report, pci.line, speed.split()[0], "link_speed in GT/s")
        lanes = int(number(self.report, pci.line, width, "link_width"))
        generation = GT_PER_S.get(rate)
        if generation is None:
            allowed = ", ".join(f"{r:g}" for r in GT_PER_S)
            raise self.report.error(pci.line, f"link_speed {speed!r}, allowed: {allowed} GT/s")
        if lanes == 0:
            return None
        return Pcie(
            bytes_per_s=pcie_bytes_per_s(generation, lanes),
            at=self.report.at(pci.line),
            generation=generation,
            width=lanes,
        )

    def machine(self) -> Machine:
        """All that was read, bridges without a purpose spliced out."""
        links: list[Nvlinks] = []
        switched: dict[int, Nvlinks] = {}
        for index, link in self.nvlinks:
            count = int(number(self.report, link.line, link.attributes.get("count", ""), "count"))
            far, at = link.attributes.get("tclass", ""), self.report.at(link.line)
            target = self.busids.get(link.attributes.get("target", "").lower())
            if far.startswith(NVSWITCH_CLASS):
                before = switched.get(index)
                count += before.count or 0 if before else 0
                at = before.at if before else at
                switched[index] = Nvlinks(a=index, b=None, count=count, at=at)
            elif far.startswith(GPU_CLASS) and target is not None and index < target:
                links.append(Nvlinks(a=index, b=target, count=count, at=at))
        return Machine(
            vertices=tuple(self.vertices),
            nvlinks=(*links, *switched.values()),
            at=self.report.at(self.root.line),
            cpu=self.cpu_model,
            nics=tuple(self.nics),
            cards=self.cards,
        ).pruned()


_PREFIX = re.compile(r"(?P<who>\S+:\d+:\d+ \[\d+\]) NCCL INFO (?P<text>.*)$")
_SYSTEM = re.compile(r"=== System : maxBw")
_SOCKET = re.compile(r"CPU/([\da-fA-F-]+) \((\d+)/(\d+)/(-?\d+)\)")
_BRANCH = re.compile(
    r"(?P<indent>\s*)\+ (?P<type>[A-Z]+)\[(?P<rate>[^\]]*)\] - (?P<far>[A-Z]+/\S+)(?P<rest>.*)"
)
_CHANNEL = re.compile(r"(\d+)\[[\da-f]+\] -> (\d+)\[[\da-f]+\](?: \[\w+\])? via (\S+)")
_VENDORS = {"1": "GenuineIntel", "2": "AuthenticAMD"}
_INTEL = {1: 79, 2: 85, 3: 143, 4: 207}
"""NCCL_TOPO_CPU_MODEL_INTEL_BDW, SKL, SRP, ERP (src/include/graph.h), which the log prints -> the least
model number of CPUID that NCCL takes for it (src/graph/topo.cc)."""
_NO_LIMIT = 1000.0
"""GB/s. A SYS link above this is LOC_BW, 5000: no figure at all."""


def read_log(report: Report) -> tuple[Machine | None, dict[Pair, tuple[bool, str]]]:
    """The machine of the first rank's GRAPH lines (None without them), and which ranks of one host
    talk peer to peer. Raises ConfigError where a log has neither."""
    who, block = "", list[tuple[int, str]]()
    access: dict[Pair, tuple[bool, str]] = {}
    for line, text in report.numbered():
        found = _PREFIX.search(text)
        if found is None:
            continue
        said = found["text"]
        if not who and _SYSTEM.search(said):
            who = found["who"]
        elif found["who"] == who and said.startswith("=====") and block:
            who = "done"
        elif found["who"] == who:
            block.append((line, said))
        channel = _CHANNEL.search(said)
        if channel and not channel[3].startswith("NET"):
            pair = int(channel[1]), int(channel[2])
            access[pair] = channel[3].startswith("P2P"), f"{report.at(line)}: via {channel[3]}"
    if not block and not access:
        what = "neither a line '=== System' nor 'via P2P', allowed: a log with NCCL_DEBUG=INFO"
        raise report.error(1, f"{what} and NCCL_DEBUG_SUBSYS=INIT,GRAPH")
    return (_log_tree(report, block) if block else None), access


def _log_tree(report: Report, block: list[tuple[int, str]]) -> Machine:
    vertices: list[Vertex] = []
    ranks: dict[str, int] = {}
    bonds: list[tuple[str, str, float, int]] = []
    nics: list[tuple[str, Reading | None]] = []
    above: list[tuple[int, str]] = []
    cpu: tuple[str, int] | None = None
    between: Reading | None = None
    for line, text in block:
        socket, branch = _SOCKET.match(text), _BRANCH.match(text)
        if socket:
            vendor, model = _VENDORS.get(socket[3], ""), int(socket[4])
            cpu = (vendor, _INTEL.get(model, model) if vendor == "GenuineIntel" else model)
            name = f"socket{sum(v.kind == 'socket' for v in vertices)}"
            vertices.append(Vertex(name=name, kind="socket", parent=None, at=report.at(line)))
            above = [(-1, name)]
        elif branch and above:
            indent, far = len(branch["indent"]), branch["far"]
            while len(above) > 1 and above[-1][0] >= indent:
                above.pop()
            rate = number(report, line, branch["rate"], f"{branch['type']}[...]") * 1e9
            device = far.partition("/")[0]
            if branch["type"] == "PCI" and device in ("PCI", "GPU"):
                if above[-1][1] in ranks:
                    what = f"{far} hangs on {above[-1][1]}, allowed: indented as NCCL prints it"
                    raise report.error(line, what)
                kind: Kind = "gpu" if device == "GPU" else "switch"
                link = Pcie(bytes_per_s=rate * NCCL_PCIE, at=report.at(line))
                vertices.append(
                    Vertex(name=far, kind=kind, parent=above[-1][1], at=report.at(line), pcie=link)
                )
                if device == "GPU":
                    rank = re.search(r"\((\d+)\)", branch["rest"])
                    ranks[far] = int(rank[1]) if rank else len(ranks)
                above.append((indent, far))
            elif branch["type"] == "NVL" and above[-1][1] in ranks:
                bonds.append((above[-1][1], far, rate, line))
            elif branch["type"] == "SYS" and 0 < rate < _NO_LIMIT * 1e9:
                between = between or Reading(rate, report.at(line))
            elif branch["type"] == "NET":
                nics.append((far, Reading(rate, report.at(line))))
    if not ranks:
        raise report.error(block[0][0], "no GPU below '=== System', allowed: a whole GRAPH block")
    order = {name: i for i, name in enumerate(sorted(ranks, key=lambda name: ranks[name]))}
    gpus = {name: f"gpu{i}" for name, i in order.items()}
    return Machine(
        vertices=tuple(replace(v, name=gpus.get(v.name, v.name)) for v in vertices),
        nvlinks=tuple(_bonds(report, bonds, order)),
        at=report.at(block[0][0]),
        cpu=cpu,
        nics=tuple(nics),
        between_sockets=between,
    ).pruned()


def _bonds(
    report: Report, bonds: list[tuple[str, str, float, int]], order: Mapping[str, int]
) -> list[Nvlinks]:
    """Each NVLink bond once; the far end is a GPU or the switch (NVS)."""
    found = []
    for near, far, rate, line in bonds:
        a, b = order[near], order.get(far)
        if far.startswith("NVS") or (b is not None and a < b):
            found.append(Nvlinks(a=a, b=b, count=None, at=report.at(line), bytes_per_s=rate))
    return found
