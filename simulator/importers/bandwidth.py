"""Measured copies: nvbandwidth's JSON and the text of CUDA's p2pBandwidthLatencyTest.

Latencies of p2pBandwidthLatencyTest are not read: they time the issue of a copy, which costs more than
the wire, and come out smaller between two GPUs than within one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from simulator.importers.machine import Bandwidths, Card, Pair, Reading, pci_address
from simulator.importers.reading import Report, number, parse_json, positive

_GB = 1e9
_HOST = ("host_to_device_memcpy_ce", "device_to_host_memcpy_ce")
_PEER = ("device_to_device_memcpy_write_ce", "device_to_device_memcpy_read_ce")
"""Written: the row's GPU is the source. Read: the row's GPU is the target. So the copies are issued
(NVIDIA/nvbandwidth testcases_ce.cpp); the arrows of ``bandwidth_description`` point the other way."""
_ALL_TO_HOST = {
    "all_to_host_memcpy_ce": 1, "host_to_all_memcpy_ce": 1,
    "all_to_host_bidirectional_memcpy_ce": 2, "host_to_all_bidirectional_memcpy_ce": 2,
}  # fmt: skip
"""Copies of all GPUs at once, and how many bytes cross host memory for each byte reported: the
bidirectional ones report one direction of two."""


def read_nvbandwidth(report: Report) -> Bandwidths:
    """What an ``nvbandwidth -j`` measured with copy engines. Raises ConfigError."""
    data = parse_json(report)
    body = data.get("nvbandwidth") if isinstance(data, dict) else None
    cases = body.get("testcases") if isinstance(body, dict) else None
    if not isinstance(cases, list) or not all(isinstance(c, dict) and "name" in c for c in cases):
        raise report.error(1, "no nvbandwidth.testcases, allowed: the output of nvbandwidth -j")
    peer: dict[Pair, Reading] = {}
    host: dict[int, Reading] = {}
    memory: list[Reading] = []
    access: dict[Pair, tuple[bool, str]] = {}
    gpus = 0
    for case in cases:
        name = str(case["name"])
        passed = str(case.get("status", "passed")).lower() == "passed"
        if not passed or name not in {*_HOST, *_PEER, *_ALL_TO_HOST}:
            continue
        line = _line_of(report, name)
        cells = _cells(report, line, case)
        gpus = max(gpus, *(j + 1 for _, j in cells), 0)
        at = f"{report.at(line)} {name}"
        if name in _PEER:
            for (row, column), value in cells.items():
                if row == column:
                    continue
                pair = (row, column) if name == _PEER[0] else (column, row)
                if value is not None and (pair not in peer or name == _PEER[0]):
                    peer[pair] = Reading(value, at)
                said = "N/A" if value is None else "copied"
                access.setdefault(pair, (value is not None, f"{at}: {said}"))
        elif name in _HOST:
            for j in {j for _, j in cells}:
                near = max(v or 0.0 for (_, column), v in cells.items() if column == j)
                if near and (j not in host or near < host[j].value):
                    host[j] = Reading(near, at)
        else:
            total = sum(v or 0.0 for v in cells.values()) * _ALL_TO_HOST[name]
            memory += [Reading(total, at)] if total else []
    if not (peer or host or memory):
        known_names = ", ".join((*_HOST, *_PEER, *_ALL_TO_HOST))
        raise report.error(1, f"no test case that is used passed, allowed: {known_names}")
    return Bandwidths(
        peer=peer,
        host=host,
        host_memory=max(memory, key=lambda r: r.value, default=None),
        access=access,
        cards=_cards(report),
        gpus=gpus,
        at=report.at(1),
    )


_LISTED = re.compile(r'"(\d+): (.+?)(?: \(([\da-fA-F:.]+)\))?"')


def _cards(report: Report) -> dict[int, Card]:
    """The "GPU Device list"."""
    return {
        int(found[1]): Card(model=found[2], address=pci_address(found[3] or ""), at=report.at(line))
        for line, text in report.numbered()
        if (found := _LISTED.search(text))
    }


def _line_of(report: Report, name: str) -> int:
    """Where a test case begins: JSON libraries keep no positions."""
    return next((n for n, text in report.numbered() if f'"{name}"' in text), 1)


def _cells(report: Report, line: int, case: Mapping[str, object]) -> dict[Pair, float | None]:
    """bytes/s by (row, column); None for N/A, and on the diagonal, where old versions print 0.00."""
    matrix = case.get("bandwidth_matrix")
    if not isinstance(matrix, list) or not matrix or not all(isinstance(r, list) for r in matrix):
        raise report.error(line, f"{case['name']}: no bandwidth_matrix, allowed: a list of rows")
    if len({len(row) for row in matrix}) > 1:
        raise report.error(line, f"{case['name']}: rows of different length in bandwidth_matrix")
    between = case["name"] in _PEER
    return {
        (i, j): None
        if cell in ("N/A", None) or (between and i == j)
        else positive(report, line, cell, f"{case['name']} [{i}][{j}]") * _GB
        for i, row in enumerate(matrix)
        for j, cell in enumerate(row)
    }


_DEVICE = re.compile(
    r"Device:\s*(\d+),\s*([^,]*)(?:, pciBusID: (\w+), pciDeviceID: (\w+), pciDomainID:(\w+))?"
)
_ACCESS = re.compile(r"Device=(\d+) (CAN|CANNOT) Access Peer Device=(\d+)")
_TITLES = {
    "Unidirectional P2P=Disabled Bandwidth": "staged",
    "Unidirectional P2P=Enabled Bandwidth": "peer",
    "Bidirectional P2P=Disabled Bandwidth": "both",
}


def read_p2p_test(report: Report) -> Bandwidths:
    """What a p2pBandwidthLatencyTest measured. Pairs of its "P2P=Enabled" matrix that have no peer
    access ran through the host, so they count as staged. Raises ConfigError."""
    tables: dict[str, dict[Pair, Reading]] = {"staged": {}, "peer": {}, "both": {}}
    access: dict[Pair, tuple[bool, str]] = {}
    cards, table, columns = dict[int, Card](), "", list[int]()
    for line, text in report.numbered():
        able, words = _ACCESS.search(text), text.split()
        if able:
            said = f"{report.at(line)}: {able[2]} access"
            access[int(able[1]), int(able[3])] = (able[2] == "CAN", said)
        elif device := _DEVICE.match(text.strip()):
            address = pci_address(f"{device[5]}:{device[3]}:{device[4]}")
            cards[int(device[1])] = Card(model=device[2], address=address, at=report.at(line))
        elif "Matrix" in text:
            table = next((key for title, key in _TITLES.items() if title in text), "")
            if "(P2P Reads)" in text:
                table = ""
            columns = []
        elif table and text.strip().startswith("D\\D"):
            columns = [int(number(report, line, w, "column")) for w in words[1:]]
        elif table and columns and words and words[0].isdecimal():
            if len(words) != 1 + len(columns):
                what = f"row {words[0]} has {len(words) - 1} numbers, allowed: {len(columns)}"
                raise report.error(line, what)
            row = int(words[0])
            tables[table] |= {
                (row, column): Reading(
                    positive(report, line, w, f"GPU {row} to {column} in GB/s") * _GB,
                    report.at(line),
                )
                for column, w in zip(columns, words[1:], strict=True)
                if row != column
            }
    if not any(tables.values()):
        what = "no bandwidth matrix, allowed: the output of p2pBandwidthLatencyTest"
        raise report.error(1, what)
    refused = {pair for pair, (able, _) in access.items() if not able}
    staged = {p: r for p, r in tables["peer"].items() if p in refused} | tables["staged"]
    memory = [Reading(2 * r.value, r.at) for r in (*staged.values(), *tables["both"].values())]
    found = [i for readings in tables.values() for pair in readings for i in pair]
    return Bandwidths(
        peer={p: r for p, r in tables["peer"].items() if p not in refused},
        staged=staged,
        both=tables["both"],
        host_memory=max(memory, key=lambda r: r.value, default=None),
        access=access,
        cards=cards,
        gpus=len(cards) or 1 + max(found),
        at=report.at(1),
    )
