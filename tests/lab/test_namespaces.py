"""Hosts in namespaces: what is built is the topology, and nothing of it outlives its maker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from paradiff.config import ConfigError
from paradiff.lab import namespaces
from paradiff.lab.ranks import sweep
from simulator.topology import Link, Topology

REASON = namespaces.why_not()
needs_root = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MAKER = """
import sys
from paradiff.lab import namespaces
from paradiff.lab.ranks import sweep
with namespaces.hosts(namespaces.star(2)) as found:
    child = namespaces.start(found[1], ["sh", "-c", "echo inside; exec sleep 1000"], {})
    child.stdout.readline()
    print(*(host.pid for host in found), child.pid, flush=True)
    sys.stdin.read()
"""

LISTENER = """
import socket
server = socket.create_server(("", 5000))
print("listening", flush=True)
print(server.accept()[1][0])
"""
CALLER = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=200)"
WITHIN_S = 300
"""What takes longer hangs, on a busy machine too."""


def machine() -> tuple[str, str, str]:
    """Links, named namespaces and routes of the machine itself."""
    return tuple(  # type: ignore[return-value]
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
        for words in (["-br", "link"], ["netns", "list"], ["route"])
    )


def namespace_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def kept(stack: ExitStack, pid: int) -> str:
    """The same; a file stays open on it, so that no other has its name: the kernel gives the number of
    one that has gone to the next that anybody makes, of other tests too."""
    file = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    stack.callback(os.close, file)
    return f"net:[{os.fstat(file).st_ino}]"


def alive(namespace: str) -> list[str]:
    """Processes inside a network namespace."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns" / "net") == namespace:
                found.append(path.name)
        except OSError:
            continue
    return found


def inside(host: namespaces.Host, *command: str) -> str:
    process = namespaces.start(host, command, {})
    out, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, errors
    return out


def two_switches() -> Topology:
    """Two hosts a switch; the trunk carries 30 MB/s one way and 20 the other."""
    names = ("a", "b", "c", "d")
    ends = [("a", "s"), ("b", "s"), ("c", "t"), ("d", "t")]
    links = [Link(a=a, b=b, bandwidth_bytes_per_s=50e6) for a, b in ends]
    trunk = Link(a="s", b="t", bandwidth_bytes_per_s=30e6, back_bytes_per_s=20e6)
    uniform = Topology.uniform(4)
    node = replace(uniform.nodes[0], gpus=names)
    return replace(
        uniform, gpus=names, nodes=(node,), switches=("s", "t"), links=(*links, trunk)
    )  # fmt: skip


@needs_root
def test_links_are_those_of_the_topology() -> None:
    """tbf's own account of each end: 50 MB/s is 400 Mbit/s, the trunk 240 one way and 160 the other.
    Both hosts of one switch and hosts of both reach each other."""
    with namespaces.hosts(two_switches()) as hosts:
        for host in hosts:
            assert "rate 400Mbit" in inside(host, "tc", "qdisc", "show", "dev", "net0")
        for there in hosts[1:]:
            listener = namespaces.start(there, [sys.executable, "-c", LISTENER], {})
            assert listener.stdout is not None
            assert listener.stdout.readline() == "listening\n"
            inside(hosts[0], sys.executable, "-c", CALLER, there.address)
            assert listener.communicate(timeout=WITHIN_S)[0] == f"{hosts[0].address}\n"
        spaces = set()
        for child in children_of(os.getpid()):  # helpers of other tests among them, and ended ones
            with suppress(OSError):
                spaces.add(namespace_of(child))
        (hub,) = spaces - {namespace_of(pid) for pid in (os.getpid(), *(h.pid for h in hosts))}
        trunk = json.loads(inside_namespace(hub, "tc", "-j", "qdisc", "show"))
        rates = {q["dev"]: q["options"]["rate"] for q in trunk if q["kind"] == "tbf"}
    assert [rates[f"port4{side}"] for side in "ab"] == [30e6, 20e6]
    assert sorted(rates.values()) == [20e6, 30e6, *[50e6] * 4]


def inside_namespace(namespace: str, *command: str) -> str:
    host = namespaces.Host(int(alive(namespace)[0]), "")
    return inside(host, *command)


@needs_root
@pytest.mark.parametrize("end", ["ordinary", "SIGKILL", "SIGTERM"])
def test_nothing_outlives_the_maker(end: str) -> None:
    """The kernel keeps a namespace, and the links in it, as long as a process is inside or a file names
    it. No file does; so they are gone when their processes are, also where nobody could clean up."""
    before = machine()
    with ExitStack() as stack:
        with subprocess.Popen(
            [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as maker:
            made = ended(maker, end, before, stack)
        deadline = time.monotonic() + WITHIN_S
        while any(alive(namespace) for namespace in made) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(namespace) for namespace in made)
    assert machine() == before


def ended(maker: subprocess.Popen[str], end: str, before: object, stack: ExitStack) -> set[str]:
    """The namespaces that ``maker`` made, while it was there; then it ends as it is told."""
    assert maker.stdout is not None
    pids = [int(word) for word in maker.stdout.readline().split()]
    made = {kept(stack, pid) for pid in pids}
    assert len(made) == 2
    assert namespace_of(os.getpid()) not in made
    assert machine() == before, "only namespaces of our own were touched"
    if end == "ordinary":
        maker.communicate("", timeout=WITHIN_S)
        assert maker.returncode == 0
    else:
        maker.send_signal(getattr(signal, end))
        maker.wait(WITHIN_S)
    return made


LAB = (
    "validate", "lab", "--topology", "lab-star", "--strategy", "patch=4", "--height", "128", "--width",
    "64", "--steps", "50", "--regime", "communication",
)  # fmt: skip


@needs_root
@pytest.mark.torch
@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL"])
def test_nothing_outlives_a_laboratory_that_is_killed(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, while its ranks are in calls: Ctrl-C goes to all its processes, SIGKILL to the
    first alone. Processes and namespaces are gone; a scratch folder that nobody could remove goes at the
    next start."""
    pytest.importorskip("torch")
    before = machine()
    command = subprocess.Popen(
        [sys.executable, "-m", "paradiff", *LAB],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    stack = ExitStack()
    try:
        made = with_ranks(command, stack)
        spaces = {made[pid] for pid in made} - {namespace_of(os.getpid())}
        assert len(spaces) >= 5, "four hosts and their switch"
        assert machine() == before, "only namespaces of our own were touched"
        if end == "SIGINT":
            os.killpg(command.pid, signal.SIGINT)
        else:
            command.kill()
        _, errors = command.communicate(timeout=WITHIN_S)
        until = time.monotonic() + WITHIN_S
        while gone(made, spaces) is not None and time.monotonic() < until:
            time.sleep(0.05)
        assert gone(made, spaces) is None
    finally:
        command.kill()
        stack.close()
    assert machine() == before
    assert command.returncode == (130 if end == "SIGINT" else -signal.SIGKILL), errors
    left = list(tmp_path.glob("paradiff-lab-*"))
    assert len(left) == (end == "SIGKILL")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep()
    assert not list(tmp_path.glob("paradiff-lab-*"))


def with_ranks(command: subprocess.Popen[str], stack: ExitStack) -> dict[int, str]:
    """The network namespaces of all processes of ``command``, once ranks are among them: children of one
    of its children, each on a host."""
    until = time.monotonic() + 2 * WITHIN_S
    while time.monotonic() < until:
        assert command.poll() is None, command.communicate()[1]
        try:
            own = children_of(command.pid)
            ranks = [rank for pid in own for rank in children_of(pid)]
            hosts = {namespace_of(rank) for rank in ranks}
            if len(hosts) == 4 and namespace_of(os.getpid()) not in hosts:
                return {pid: kept(stack, pid) for pid in [*own, *ranks]}
        except OSError:
            continue
        time.sleep(0.05)
    raise AssertionError("no ranks")


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: Collection[int], spaces: Collection[str]) -> str | None:
    """What is left of them; None where nothing is. A process that ended and was not waited for is gone:
    it has no namespace."""
    left = [pid for pid in pids if lives(pid)]
    inside_ = [each for space in spaces for each in alive(space)]
    return f"processes {left}, in namespaces {inside_}" if left or inside_ else None


def lives(pid: int) -> bool:
    try:
        return bool(namespace_of(pid))
    except OSError:
        return False


def broken(**change: object) -> Topology:
    box = namespaces.star(3)
    first, *others = box.links
    return replace(box, links=(replace(first, **change), *others))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (broken(duplex="half"), "half duplex, allowed: full"),
        (broken(latency_s=2e-6), "latency of 2 us, allowed: 0 us"),
        (broken(b="gpu1"), "gpu0 needs one link, to a switch"),
        (
            replace(
                two_switches(),
                links=(*two_switches().links, Link(a="a", b="t", bandwidth_bytes_per_s=1e6)),
            ),
            "links form a loop",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(box: Topology, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        namespaces.check(box)
