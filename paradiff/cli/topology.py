"""``paradiff topology``: boxes, shipped, written by hand or imported from what other tools print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paradiff.cli.common import (
    GATE_FAILED,
    check_output_file,
    group,
    load_model,
    one_message,
    progress,
    shipped,
    workload_of,
    write_file,
)  # fmt: skip

if TYPE_CHECKING:
    from analysis.doctor import Cost, Finding
    from simulator.importers.machine import Facts
    from simulator.topology import Topology

app = group("Boxes.")


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="Shipped name, or a YAML file.",
            autocompletion=shipped("topologies"),
        ),
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it, too: one page, hover for sources.")
    ] = None,
) -> None:
    """Print a box as a tree: nodes, switches, links, GPUs."""
    with one_message():
        from simulator.topology import load_topology

        box = load_topology(name)
        if html is not None:
            from analysis import topology_picture

            write_file(html, topology_picture.page(box))
    from analysis import text

    typer.echo("\n".join(text.topology_tree(box)))


def _file(help_: str) -> Any:
    return typer.Option(metavar="FILE", help=help_)


Smi = Annotated[str | None, _file("nvidia-smi topo -m")]
P2p = Annotated[str | None, _file("nvidia-smi topo -p2p rw")]
NcclXml = Annotated[str | None, _file("what NCCL_TOPO_DUMP_FILE wrote")]
NcclLog = Annotated[str | None, _file("a log with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,GRAPH")]
Nvbandwidth = Annotated[str | None, _file("nvbandwidth -j")]
P2pTest = Annotated[str | None, _file("p2pBandwidthLatencyTest")]
NcclTests = Annotated[list[str] | None, _file("output of nccl-tests; may be repeated")]
Lstopo = Annotated[str | None, _file("lstopo FILE.xml")]


@app.command(name="import")
def import_(
    gpu: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="GPU profile of the box: l40s.", autocompletion=shipped("gpus")
        ),
    ],
    nvidia_smi: Smi = None,
    p2p: P2p = None,
    nccl_xml: NcclXml = None,
    nccl_log: NcclLog = None,
    nvbandwidth: Nvbandwidth = None,
    p2p_test: P2pTest = None,
    nccl_tests: NcclTests = None,
    lstopo: Lstopo = None,
    nodes: Annotated[
        int, typer.Option(min=1, metavar="N", help="So many such machines on one network.")
    ] = 1,
    nic_rate: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="GBIT", help="Of each adapter, with --nodes; default: the files'."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the box; default: the file's.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The topology; default: stdout.")
    ] = None,
) -> None:
    """Make one topology of what other tools print about a box, each link with its source."""
    files = _given(locals())
    with one_message():
        from simulator.importers.assemble import to_yaml
        from simulator.importers.cluster import cluster

        if output is not None:
            check_output_file(output)
        facts, box = _imported(
            files, nccl_tests or [], gpu, name or (output.stem if output else None)
        )
        data = cluster(box, facts.machine, nodes, nic_rate) if nodes > 1 else box
        topology = _topology(box)
        command = shlex.join(["paradiff", "topology", "import", *sys.argv[3:]])
        text = to_yaml(data, [command])
        if output is not None:
            write_file(output, text)
    if output is None:
        typer.echo(text, nl=False)
    else:
        gpus = nodes * len(facts.machine.gpus)
        typer.echo(f"{output}: {gpus} GPUs, {len(data['links'])} links")
    from analysis import text as words
    from analysis.doctor import diagnose

    for line in words.measured_sizes(topology):
        typer.echo(line, err=output is None)
    _print_findings(diagnose(topology, facts), err=output is None)


@app.command()
def doctor(
    box: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|FILE]",
            help="A box; not needed with the files of an import.",
            autocompletion=shipped("topologies"),
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="GPU profile, with the files of an import.",
            autocompletion=shipped("gpus"),
        ),
    ] = None,
    nvidia_smi: Smi = None,
    p2p: P2p = None,
    nccl_xml: NcclXml = None,
    nccl_log: NcclLog = None,
    nvbandwidth: Nvbandwidth = None,
    p2p_test: P2pTest = None,
    nccl_tests: NcclTests = None,
    lstopo: Lstopo = None,
    model: Annotated[str, typer.Option(help="What repairs are worth is planned for it.")] = "sdxl",
    what_if: Annotated[
        bool, typer.Option("--what-if/--no-what-if", help="Plan each repair to see its gain.")
    ] = True,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if something is wrong.")] = False,
) -> None:
    """Say what is wrong with a box, the evidence, what it costs and what to do."""
    files = _given(locals())
    with one_message():
        from analysis.doctor import costs, diagnose
        from paradiff.config import ConfigError
        from simulator.topology import load_topology

        facts: Facts | None = None
        if files:
            known = load_topology(box) if box is not None else None
            profile_name = gpu or (known.profiles[0] if known is not None else None)
            if profile_name is None:
                raise ConfigError("--gpu is missing, allowed: the GPU profile of the box (l40s)")
            facts, data = _imported(files, nccl_tests or [], profile_name, None)
            topology = known or _topology(data)
        elif box is not None:
            topology = load_topology(box)
        else:
            raise ConfigError("no box, allowed: a name, a file, or the files of an import")
        findings = diagnose(topology, facts)
        worth: dict[str, Cost] = {}
        if what_if and any(finding.repaired for finding in findings):
            profile = load_model(model)
            workload = workload_of(profile, dict.fromkeys(profile.defaults), 1, "bf16")
            with progress(enabled=True) as advance:
                worth = costs(profile, workload, topology, findings, advance)
    _print_findings(findings, worth, model)
    if check and any(finding.severity == "wrong" for finding in findings):
        raise typer.Exit(GATE_FAILED)


SINGLE = ("nccl_xml", "lstopo", "nccl_log", "nvidia_smi", "p2p", "nvbandwidth", "p2p_test")


def _given(options: dict[str, Any]) -> dict[str, str]:
    return {kind: options[kind] for kind in SINGLE if options[kind] is not None}


def _imported(
    files: dict[str, str], runs: Sequence[str], gpu: str, name: str | None
) -> tuple[Facts, dict[str, Any]]:
    from simulator.importers.assemble import default_name, read_facts, topology_data

    facts = read_facts(files, runs)
    data = topology_data(facts, name or default_name(files), gpu)
    for note in facts.notes:
        typer.echo(f"note: {note}", err=True)
    return facts, data


def _topology(data: dict[str, Any]) -> Topology:
    """The box of an import. Raises ConfigError with the source of a number that cannot be."""
    from paradiff.config import ConfigError
    from simulator.box_lint import box_problems
    from simulator.topology import TopologyFile

    file = TopologyFile.model_validate(data)
    box = file.topology()
    for (part, number, *_), what in box_problems(file, box):
        raise ConfigError(f"{data[str(part)][number]['source']}: {what}")
    return box


def _print_findings(
    findings: Sequence[Finding],
    worth: dict[str, Cost] | None = None,
    model: str = "",
    *,
    err: bool = False,
) -> None:
    from analysis import text

    typer.echo("\n".join(text.findings(findings, worth or {}, model)), err=err)
