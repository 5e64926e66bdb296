"""Measured transfers as a file of their own and as the ``collectives:`` of a topology."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from paradiff.config import ConfigError, find
from paradiff.units import size_text
from simulator.topology import Topology, TopologyFile, load_topology

COLUMNS = (
    "kind", "ranks", "way", "nbytes", "time_us", "low_us", "high_us", "runs", "compute_us",
    "together_us",
)  # fmt: skip
"""``ranks`` joined by -. Median and quartiles of ``runs`` samples, the slowest rank's; a piece of
compute alone, and both at once."""


class Measured(NamedTuple):
    """One transfer, seconds; the fields of ``COLUMNS``."""

    kind: str
    ranks: tuple[int, ...]
    way: str
    nbytes: int
    time_s: float
    low_s: float
    high_s: float
    runs: int
    compute_s: float
    together_s: float


def to_csv(header: Mapping[str, str], rows: Iterable[Measured]) -> str:
    """The file: ``# key: value`` lines, column names, rows."""
    lines = [f"# {key}: {' '.join(value.split())}" for key, value in header.items()]
    lines.append(",".join(COLUMNS))
    for r in rows:
        times = (r.time_s, r.low_s, r.high_s, r.compute_s, r.together_s)
        us = [f"{t * 1e6:.6g}" for t in times]
        cells = (r.kind, "-".join(map(str, r.ranks)), r.way, r.nbytes, *us[:3], r.runs, *us[3:])
        lines.append(",".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def check_box(box: Topology, devices: Sequence[int]) -> None:
    """Raises ConfigError where the ranks' devices are not GPUs of one node of the box."""
    if not devices or max(devices) >= len(box.gpus):
        raise ConfigError(f"{len(devices)} ranks, but {box.name} has {len(box.gpus)} GPUs")
    if len({box.node_of(device).name for device in devices}) > 1:
        raise ConfigError(f"ranks on several nodes of {box.name}, allowed: one node")


def check_library(box: Topology, device: str) -> None:
    """Raises ConfigError where calls between CPUs (gloo) would stand for those between a box's GPUs."""
    joined = [k.kind for k in box.links if k.is_nvlink or k.kind.startswith("pcie")]
    if device == "cpu" and joined:
        what = f"gloo's times between CPUs are not those of GPUs on {joined[0]}"
        allowed = "--device cuda, or no --topology and --output"
        raise ConfigError(f"--topology {box.name}: {what}, allowed: {allowed}")


def with_tables(name: str, rows: Sequence[Measured], devices: Sequence[int], source: str) -> str:
    """The text of the topology called ``name`` with the collectives among ``rows`` as measured tables.

    ``devices[rank]`` is the device index of each rank. A table of all GPUs of the node holds for the
    node, another for the GPUs that took part; it takes the place of an older one of the same kind,
    ranks and scope. Comments of the file stay. Raises ConfigError.
    """
    path = find("topologies", name)
    box = load_topology(path)
    check_box(box, devices)
    yaml = YAML(typ="rt")
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    data = yaml.load(path.read_text(encoding="utf-8"))
    new = [_entry(box, group, devices, source) for group in _groups(rows)]
    old = [
        entry
        for entry in data.get("collectives") or []
        if not any(_same(entry, other) for other in new)
    ]
    data["collectives"] = [*old, *new]
    out = io.StringIO()
    yaml.dump(data, out)
    TopologyFile.model_validate(YAML(typ="safe", pure=True).load(out.getvalue()))
    return out.getvalue()


def _groups(rows: Iterable[Measured]) -> list[list[Measured]]:
    found: dict[tuple[str, tuple[int, ...]], list[Measured]] = {}
    for row in rows:
        if row.kind != "p2p":
            found.setdefault((row.kind, row.ranks), []).append(row)
    return list(found.values())


def _entry(
    box: Topology, rows: Sequence[Measured], devices: Sequence[int], source: str
) -> dict[str, Any]:
    gpus = [box.gpus[devices[rank]] for rank in rows[0].ranks]
    whole = set(gpus) == set(box.node_of(devices[0]).gpus)
    return {
        "kind": rows[0].kind,
        "ranks": len(gpus),
        "scope": "node" if whole else _flow(gpus),
        "source": source,
        "table": [
            _flow([size_text(row.nbytes), f"{row.time_s * 1e6:.6g} us"])
            for row in sorted(rows, key=lambda row: row.nbytes)
        ],
    }


def _flow(items: Sequence[str]) -> CommentedSeq:
    """A list on one line of the file."""
    line = CommentedSeq(items)
    line.fa.set_flow_style()
    return line


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an entry of the file speaks of the same calls."""
    scope = old.get("scope", "node")
    members = scope if isinstance(scope, str) else sorted(map(str, scope))
    wanted = new["scope"] if isinstance(new["scope"], str) else sorted(new["scope"])
    return (old["kind"], int(old["ranks"]), members) == (new["kind"], new["ranks"], wanted)
