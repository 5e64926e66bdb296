"""Text output of nccl-tests: one table for each program that ran, out of place.

Sizes are kept as printed (the gathered buffer for all_gather and reduce_scatter, the buffer of one rank
for the others), which is the convention of topology files, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from simulator.importers.machine import Card, CollectiveRun, Reading, pci_address
from simulator.importers.reading import Report, number, positive

KINDS = {
    "all_gather": "all_gather", "all_reduce": "all_reduce", "alltoall": "all_to_all",
    "broadcast": "broadcast", "reduce_scatter": "reduce_scatter",
}  # fmt: skip
_PROGRAM = re.compile(r"\b([a-z_]+)_perf\b")
_RANK = re.compile(
    r"#\s+Rank\s+(?P<rank>\d+)\s.*?\bon\s+(?P<host>\S+)\s+device\s+(?P<device>\d+)\s"
    r"(?:\s*\[(?P<address>[^\]]*)\]\s*(?P<model>.*))?"
)
_ROW = re.compile(r"\s*(?:\[[\d,]+\]<stdout>:)?\s*(\d+)\s+(\d+)\s+([a-z]\w*)\s+(.*)")
_CUT_ROW = re.compile(
    r"\s*(?:\[[\d,]+\]<stdout>:)?\s*"
    r"\d+(?:\s+\d+(?:\s+(?:u?int|half|float|double|bfloat|fp?8|char).*)?)?\s*"
)


@dataclass(slots=True)
class _Run:
    """One program's output while it is read."""

    kind: str = ""
    line: int = 0
    ranks: dict[int, tuple[str, int, Card]] = field(default_factory=dict)
    rows: list[tuple[int, float, float, int]] = field(default_factory=list)
    shape: tuple[str, bool, float] = ("", False, 0.0)
    """Of the last row: redop, whether a root is named, busbw over algbw."""


def read_nccl_tests(report: Report) -> tuple[tuple[CollectiveRun, ...], tuple[str, ...]]:
    """Every table of a file, and a note for each that is no collective which topologies hold. It is
    named by a line with ``NAME_perf`` (the command, or the header of newer versions), else by the file's
    name, else told by its columns where they can only be one's. Raises ConfigError."""
    runs = [_Run()]
    for line, text in report.numbered():
        program, rank, row = _PROGRAM.search(text), _RANK.search(text), _ROW.fullmatch(text)
        if program and "Avg bus" not in text:
            if runs[-1].rows:
                runs.append(_Run())
            runs[-1].kind, runs[-1].line = _kind(program[1]), line
        elif rank:
            if runs[-1].rows:
                runs.append(_Run())
            number_ = int(rank["rank"])
            if number_ in runs[-1].ranks:
                what = f"second rank {number_}, allowed: one job (build nccl-tests with MPI=1)"
                raise report.error(line, what)
            card = Card(
                model=(rank["model"] or "").strip(),
                address=pci_address(rank["address"] or ""),
                at=report.at(line),
            )
            runs[-1].ranks[number_] = (rank["host"], int(rank["device"]), card)
        elif row and len(row[4].split()) >= 8:
            _add_row(report, line, row, runs[-1])
        elif runs[-1].ranks and _CUT_ROW.fullmatch(text):
            raise report.error(
                line, f"row is cut ({text.strip()}), allowed: whole rows, 12 or 13 columns"
            )
    used = [run for run in runs if run.rows and run.kind in ("", *KINDS.values())]
    others = [run for run in runs if run.kind not in ("", *KINDS.values())]
    if others and not used:
        what = f"{others[0].kind}_perf is not used, allowed: {', '.join(KINDS)}"
        raise report.error(others[0].line, what)
    if not used:
        what = "no row with a time, allowed: the output of nccl-tests (size count type ... time)"
        raise report.error(1, what)
    notes = tuple(f"{report.at(run.line)}: {run.kind}_perf is not used" for run in others)
    return tuple(_finished(report, run) for run in used), notes


def _kind(name: str) -> str:
    """What topologies call the program's collective; its own name where they hold none."""
    return next((kind for known, kind in KINDS.items() if name.endswith(known)), name)


def _told_by(run: _Run) -> str:
    """The one collective with these columns; nothing for all_gather and alltoall, which look alike."""
    redop, rooted, ratio = run.shape
    if redop == "sum" and not rooted and len(run.ranks) > 2:
        half = (len(run.ranks) - 1) / len(run.ranks)
        return "all_reduce" if abs(ratio - 2 * half) < abs(ratio - half) else "reduce_scatter"
    return "broadcast" if redop == "none" and rooted else ""


def _add_row(report: Report, line: int, row: re.Match[str], run: _Run) -> None:
    """Columns from the end: time, algbw, busbw and #wrong, out of place and then in place."""
    size, words = int(row[1]), row[4].split()
    time, algbw, busbw, wrong = words[-8:-4]
    if wrong not in ("0", "N/A") and number(report, line, wrong, "#wrong") > 1e-3:
        raise report.error(line, f"{wrong} wrong results, allowed: 0")
    if size:
        seconds = positive(report, line, time, "time in us") * 1e-6
        bus, rate = (number(report, line, w, "GB/s") for w in (busbw, algbw))
        run.shape = (words[0], len(words) > 9 and words[1].isdecimal(), bus / rate if rate else 0.0)
        run.rows.append((size, seconds, bus * 1e9, line))


def _finished(report: Report, run: _Run) -> CollectiveRun:
    first = run.rows[0][3]
    kind = run.kind
    if not kind:
        name = Path(report.file).name.replace("all_to_all", "alltoall")
        kind = next((k for known, k in KINDS.items() if known in name), "") or _told_by(run)
    if not kind:
        what = "which collective is this? allowed: a line with its command (all_gather_perf ...)"
        raise report.error(first, f"{what}, or its name in the file's name")
    ranks = len(run.ranks)
    if ranks < 2:
        what = f"{ranks} ranks listed, allowed: 2 or more lines '#  Rank  0 ... device  0'"
        raise report.error(run.line or first, what)
    table = {size: seconds for size, seconds, _, _ in sorted(run.rows, reverse=True)}
    members = [run.ranks[rank] for rank in sorted(run.ranks)]
    hosts = tuple(dict.fromkeys(host for host, _, _ in members))
    _, _, busbw, line = max(run.rows)
    return CollectiveRun(
        kind=kind,
        ranks=ranks,
        devices=tuple(device for host, device, _ in members if host == hosts[0]),
        cards=tuple(card for host, _, card in members if host == hosts[0]),
        hosts=hosts,
        table=tuple(sorted(table.items())),
        busbw=Reading(busbw, report.at(line)),
        at=report.at(first),
    )
