"""``nvidia-smi topo -m`` and ``nvidia-smi topo -p2p r|w|rw``: matrices of codes.

A code says how far two devices are apart, not what lies between: devices that are PIX or PXB apart
share a PCIe switch, PHB a root complex, NODE a socket, SYS (SOC on drivers before 2017) none of these.
NV# hides the PCIe distance of two GPUs; the adapters that both are near, and the NUMA column, bring it
back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulator.importers.machine import Machine, Nvlinks, Pair, Vertex
from simulator.importers.reading import Report

NEAR = {"PIX": 0, "PXB": 1, "PHB": 2, "NODE": 3, "SYS": 4, "SOC": 4}
"""Codes of PCIe distance: 0 and 1 below a switch, 2 below a root complex, 3 in a socket."""
PEER = {"OK": True, "CNS": False, "GNS": False, "TNS": False, "NS": False, "DR": False, "U": False}
PEER_WORDS = {
    "CNS": "chipset not supported", "GNS": "GPU not supported", "TNS": "topology not supported",
    "NS": "not supported", "DR": "disabled by registry key", "U": "unknown",
}  # fmt: skip
_GPU = re.compile(r"GPU(\d+)")
_MIG = re.compile(r"\s*MIG\s+\d+[a-z]*\.")


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Cells by (row, column) name with their line; ``rest`` is what follows the cells of a row."""

    names: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[str, int]]
    rest: Mapping[str, list[str]]
    line: int


def _matrix(report: Report, command: str) -> _Matrix:
    """The matrix of a report. Raises ConfigError for a row that is missing, short or contradicted."""
    header, names = 0, tuple[str, ...]()
    for line, text in report.numbered():
        words = text.partition("CPU Affinity")[0].split()
        if words and words[0] == "GPU0" and not (set(words[1:]) & ({"X", *NEAR, *PEER})):
            header, names = line, tuple(words)
            break
    if not header:
        raise report.error(1, f"no header line (GPU0 GPU1 ...), allowed: the output of {command}")
    cells: dict[tuple[str, str], tuple[str, int]] = {}
    rest: dict[str, list[str]] = {}
    for line, text in report.numbered():
        words = text.split()
        if line <= header or not words or words[0] not in names or len(words) == 1:
            continue
        if words[1] in ("=", ":"):  # the legend
            continue
        row, codes = words[0], words[1 : 1 + len(names)]
        if row in rest:
            raise report.error(line, f"second row for {row}, allowed: one matrix")
        if len(codes) < len(names):
            what = f"row {row} has {len(codes)} cells, allowed: {len(names)}, one a column"
            raise report.error(line, what)
        cells |= {(row, n): (code, line) for n, code in zip(names, codes, strict=True)}
        rest[row] = words[1 + len(names) :]
    for name in names:
        if _GPU.fullmatch(name) and name not in rest:
            raise report.error(header, f"no row for {name}, allowed: a row for every GPU column")
    return _Matrix(names, cells, rest, header)


def _gpus(report: Report, matrix: _Matrix) -> list[str]:
    gpus = [name for name in matrix.names if _GPU.fullmatch(name)]
    if gpus != [f"GPU{i}" for i in range(len(gpus))]:
        raise report.error(matrix.line, f"GPUs out of order ({', '.join(gpus)}), allowed: GPU0 on")
    return gpus


def mig_line(report: Report) -> str | None:
    """Where the report lists a MIG instance, if it does."""
    return next((report.at(n) for n, text in report.numbered() if _MIG.match(text)), None)


def read_topo(report: Report) -> Machine:
    """The machine of an ``nvidia-smi topo -m``. Raises ConfigError."""
    matrix = _matrix(report, "nvidia-smi topo -m")
    gpus = _gpus(report, matrix)
    nvlinks = []
    for (row, column), (code, line) in matrix.cells.items():
        bonded = re.fullmatch(r"NV(\d+)", code)
        if code != "X" and bonded is None and code not in NEAR:
            allowed = "X, NV# or one of " + ", ".join(NEAR)
            raise report.error(
                line, f"{row} to {column}: unknown code ({code!r}), allowed: {allowed}"
            )
        if (code == "X") != (row == column):
            raise report.error(
                line, f"{row} to {column}: {code!r}, allowed: X on the diagonal alone"
            )
        back = matrix.cells.get((column, row))
        if back is not None and back[0] != code:
            what = f"{row} to {column} is {code}, but {column} to {row} is {back[0]}"
            raise report.error(max(line, back[1]), f"{what}, allowed: a symmetric matrix")
        if bonded and row in gpus and column in gpus and gpus.index(row) < gpus.index(column):
            a, b = gpus.index(row), gpus.index(column)
            nvlinks.append(Nvlinks(a=a, b=b, count=int(bonded[1]), at=report.at(line)))
    nics = tuple((n, None) for n in matrix.names if n not in gpus)
    at = report.at(matrix.line)
    vertices = _tree(matrix, gpus, at)
    return Machine(vertices=vertices, nvlinks=tuple(nvlinks), at=at, nics=nics)


def _tree(matrix: _Matrix, gpus: Sequence[str], at: str) -> tuple[Vertex, ...]:
    """Sockets, root complexes and switches that the distances imply, then the GPUs."""
    distance = {pair: NEAR[code] for pair, (code, _) in matrix.cells.items() if code in NEAR}
    numa = {gpu: _affinity(matrix.rest[gpu]) for gpu in gpus}
    same = {(a, b): 3 for a in gpus for b in gpus if a != b and numa[a] == numa[b]}
    levels = [_groups(matrix.names, distance, level) for level in (0, 1, 2)]
    levels.append(_groups(matrix.names, {**same, **distance}, 3))
    names = ("switch", "switch", "root", "socket")
    prefix = {"switch": "plx", "root": "rc", "socket": "socket"}
    counts = dict.fromkeys(prefix, 0)
    vertices: list[Vertex] = []
    parent: dict[str, str] = {}
    for level in (3, 2, 1, 0):
        kind = names[level]
        for group in levels[level]:
            members = [gpu for gpu in gpus if gpu in group]
            below = [g for g in levels[level - 1] if g & set(members)] if level else members
            joins = level == 3 or len(below) > 1
            is_socket = level == 2 and any(g & set(gpus) == set(members) for g in levels[3])
            if not members or not joins or is_socket:
                continue
            name = f"{prefix[kind]}{counts[kind]}"
            counts[kind] += 1
            up = parent.get(members[0])
            vertices.append(Vertex(name=name, kind=kind, parent=up, at=at))  # type: ignore[arg-type]
            parent |= dict.fromkeys(members, name)
    for i, gpu in enumerate(gpus):
        vertices.append(Vertex(name=f"gpu{i}", kind="gpu", parent=parent[gpu], at=at))
    return tuple(vertices)


def _affinity(rest: Sequence[str]) -> str:
    """NUMA node of a row, else its list of CPUs, else nothing."""
    cpus, *numa = [*rest, ""]
    known = [text for text in (*numa[:1], cpus) if text and text != "N/A"]
    return known[0] if known else ""


def _groups(
    names: Iterable[str], distance: Mapping[tuple[str, str], int], level: int
) -> list[set[str]]:
    """Names joined by distances of at most ``level``, in the order of ``names``."""
    groups: list[set[str]] = []
    for name in names:
        near = [g for g in groups if any(distance.get((name, m), 9) <= level for m in g)]
        merged = {name}.union(*near)
        groups = [g for g in groups if g not in near] + [merged]
    order = {name: i for i, name in enumerate(names)}
    return sorted(groups, key=lambda group: min(order[n] for n in group))


def read_p2p(report: Report) -> dict[Pair, tuple[bool, str]]:
    """Whether each pair of an ``nvidia-smi topo -p2p`` has peer access, and the words for it."""
    matrix = _matrix(report, "nvidia-smi topo -p2p rw")
    gpus = _gpus(report, matrix)
    if len(gpus) < len(matrix.names):
        raise report.error(matrix.line, f"columns {', '.join(matrix.names)}, allowed: GPUs alone")
    access = {}
    for (row, column), (code, line) in matrix.cells.items():
        if row == column:
            continue
        if code not in PEER:
            allowed = ", ".join(PEER)
            raise report.error(
                line, f"{row} to {column}: unknown status ({code!r}), allowed: {allowed}"
            )
        words = f"{report.at(line)}: {code}"
        words += f", {PEER_WORDS[code]}" if code in PEER_WORDS else ""
        access[gpus.index(row), gpus.index(column)] = (PEER[code], words)
    return access
