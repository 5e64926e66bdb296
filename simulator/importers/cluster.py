"""Several machines like the imported one, joined by their network adapters.

Knows how to repeat a topology and to hang adapters on it. Does not know what the network between the
machines looks like, which no file of one machine says: every adapter is on one switch that carries all
of them, which the source of each link states. What one machine is: ``assemble``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paradiff.config import ConfigError
from simulator.importers.assemble import validated
from simulator.importers.machine import Machine

WIRE_SHARE = 0.94
"""What NCCL gets of an adapter's rate: 46 to 48 of 50 GB/s at 400 Gbit/s, 12 of 12.5 at 100 with RDMA
(NVIDIA/nccl maintainers across issues). Over TCP count on 60 %."""
LATENCY = "2 us"
GB, GBIT = 1e9, 1e9 / 8
FABRIC = "fabric"


def cluster(
    data: Mapping[str, Any], machine: Machine, nodes: int, gbit_per_s: float | None = None
) -> dict[str, Any]:
    """The topology ``data`` of one machine, ``nodes`` times, as plain data.

    The adapters are the machine's, one where its files name none; ``gbit_per_s`` is the rate of each, by
    default what the files state. They hang on the sockets in turn, as files do not say where. Raises
    ConfigError for fewer than two nodes and where no rate is known.
    """
    if nodes < 2:
        raise ConfigError(f"--nodes: {nodes} nodes, allowed: 2 or more")
    rates = _rates(machine, gbit_per_s)
    counts = _counts([*data["nodes"][0]["gpus"], *data["switches"]])
    nics = len(rates)
    sockets = data["nodes"][0]["memory_at"] or data["switches"][:1] or data["nodes"][0]["gpus"][:1]
    out = {key: value for key, value in data.items() if key != "links"}
    out |= {"nodes": [], "switches": [], "collectives": []}
    links: list[dict[str, Any]] = []
    for node in range(nodes):
        name = _renamer(node, counts)
        adapters = [f"nic{i + node * nics}" for i in range(nics)]
        for each in data["nodes"]:
            places = {key: [*map(name, each[key])] for key in ("gpus", "memory_at")}
            out["nodes"].append({**each, **places, "name": f"host{node}"})
        out["switches"] += [*map(name, data["switches"]), *adapters]
        links += [{**link, "ends": [*map(name, link["ends"])]} for link in data["links"]]
        for i, (adapter, (rate, source)) in enumerate(zip(adapters, rates, strict=True)):
            place = name(sockets[i * len(sockets) // nics])
            where = "assumed: as wide as the adapter; the files do not say where it hangs"
            links.append(_link([adapter, place], "pcie", rate, where))
            wire = f"{source}, of which NCCL gets {WIRE_SHARE:g}; one switch for all is assumed"
            kind = f"network-{rate / GBIT:g}g"
            links.append(_link([adapter, FABRIC], kind, rate * WIRE_SHARE, wire))
        for table in data["collectives"]:
            alone = isinstance(table["scope"], str)
            if node == 0 or not alone:
                scope = table["scope"] if alone else [*map(name, table["scope"])]
                out["collectives"].append({**table, "scope": scope})
    out["switches"].append(FABRIC)
    keys = list(data)
    found = {key: links if key == "links" else out[key] for key in keys}
    found["source"] = f"{data['source']}; {nodes} such machines, the network between them assumed"
    validated(found, machine.at)
    return found


def _rates(machine: Machine, gbit_per_s: float | None) -> list[tuple[float, str]]:
    """Bytes per second of each adapter before protocol, and who says so."""
    if gbit_per_s is not None:
        return [(gbit_per_s * GBIT, f"given: {gbit_per_s:g} Gbit/s")] * max(1, len(machine.nics))
    stated = [reading for _, reading in machine.nics if reading is not None]
    for name, reading in machine.nics:
        if reading is not None and not reading.value:
            what = f"adapter {name} has rate 0 (no link)"
            raise ConfigError(f"{reading.at}: {what}, allowed: more than 0, or --nic-rate GBIT")
    if not stated or len(stated) < len(machine.nics):
        what = "the files state no rate of the network adapters"
        raise ConfigError(f"{machine.at}: {what}, allowed: --nic-rate GBIT with --nodes")
    return [(reading.value, f"nominal: {reading.at}") for reading in stated]


def _link(ends: Sequence[str], kind: str, bytes_per_s: float, source: str) -> dict[str, Any]:
    return {
        "ends": [*ends],
        "kind": kind,
        "bandwidth": f"{bytes_per_s / GB:.4g} GB/s",
        "latency": LATENCY,
        "duplex": "full",
        "source": source,
    }


def _counts(names: Sequence[str]) -> dict[str, int]:
    """Stem -> how many numbers a machine takes of it (gpu: 8 for gpu0 to gpu7)."""
    counts: dict[str, int] = {}
    for name in names:
        stem, number = _parts(name)
        counts[stem] = max(counts.get(stem, 0), number + 1)
    return counts


def _renamer(node: int, counts: Mapping[str, int]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        stem, number = _parts(name)
        return f"{stem}{number + node * counts[stem]}"

    return rename


def _parts(name: str) -> tuple[str, int]:
    """``rc1`` -> (rc, 1); a name without a number counts as number 0 of it."""
    found = re.fullmatch(r"(.*?)(\d*)", name)
    assert found is not None
    return found[1], int(found[2] or 0)
