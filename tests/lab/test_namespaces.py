"""Hosts in namespaces: what is built is the topology, and nothing of it outlives its maker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from paradiff.config import ConfigError
from paradiff.lab import namespaces
from simulator.topology import Link, Topology

REASON = namespaces.why_not()
needs_root = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MAKER = """
import sys
from paradiff.lab import namespaces
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
CALLER = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=20)"


def machine() -> tuple[str, str, str]:
    """Links, named namespaces and routes of the machine itself."""
    return tuple(  # type: ignore[return-value]
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
        for words in (["-br", "link"], ["netns", "list"], ["route"])
    )


def namespace_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


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
    out, errors = process.communicate(timeout=30)
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
            assert listener.communicate(timeout=30)[0] == f"{hosts[0].address}\n"
        (hub,) = {namespace_of(int(p)) for p in children()} - {namespace_of(h.pid) for h in hosts}
        trunk = json.loads(inside_namespace(hub, "tc", "-j", "qdisc", "show"))
        rates = {q["dev"]: q["options"]["rate"] for q in trunk if q["kind"] == "tbf"}
    assert [rates[f"port4{side}"] for side in "ab"] == [30e6, 20e6]
    assert sorted(rates.values()) == [20e6, 30e6, *[50e6] * 4]


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def inside_namespace(namespace: str, *command: str) -> str:
    host = namespaces.Host(int(alive(namespace)[0]), "")
    return inside(host, *command)


@needs_root
@pytest.mark.parametrize("end", ["ordinary", "SIGKILL", "SIGTERM"])
def test_nothing_outlives_the_maker(end: str) -> None:
    """The kernel keeps a namespace, and the links in it, as long as a process is inside or a file names
    it. No file does; so they are gone when their processes are, also where nobody could clean up."""
    before = machine()
    with subprocess.Popen(
        [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        made = ended(maker, end, before)
    deadline = time.monotonic() + 10
    while any(alive(namespace) for namespace in made) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(namespace) for namespace in made)
    assert machine() == before


def ended(maker: subprocess.Popen[str], end: str, before: object) -> set[str]:
    """The namespaces that ``maker`` made, while it was there; then it ends as it is told."""
    assert maker.stdout is not None
    pids = [int(word) for word in maker.stdout.readline().split()]
    made = {namespace_of(pid) for pid in pids}
    assert len(made) == 2
    assert namespace_of(os.getpid()) not in made
    assert machine() == before, "only namespaces of our own were touched"
    if end == "ordinary":
        maker.communicate("", timeout=30)
        assert maker.returncode == 0
    else:
        maker.send_signal(getattr(signal, end))
        maker.wait(30)
    return made


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
