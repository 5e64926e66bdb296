"""Hosts on one machine: network namespaces joined by veth links that ``tc tbf`` shapes (Linux, root).

A namespace here has no name and no file: it belongs to a process that waits for the end of its input,
which this process holds open. When this process ends, however it ends, the kernel takes away the
processes, the namespaces and the links between them; nothing else on the machine was touched.

What is built is a topology file: every GPU is a host, every switch a bridge, every link a veth pair
whose ends are shaped, each to the rate of its own direction.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import networkx as nx

from paradiff.config import ConfigError
from paradiff.executor.launch import die_with_parent
from simulator.tcp import MTU
from simulator.topology import Link, Topology

INTERFACE = "net0"
PACKET_BYTES = 8192
"""Largest packet that a host hands to its link (it is cut into frames later), and the bucket of tbf:
a link that was idle sends this much at once."""
QUEUE = "100ms"
"""How long a packet may wait at a shaped end before it is dropped."""
TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_limit_output_bytes": "4096",
    "tcp_tso_win_divisor": "64",
    "tcp_rmem": "4096 1048576 4194304",
    "tcp_wmem": "4096 1048576 4194304",
}
"""Hosts whose TCP is in a steady state from its first packet, so that a link is the limit and not a
window: Reno's, which every kernel has (BBR, a default in places, pauses for tens of milliseconds), no
slow start again after a pause, no waiting for acknowledgements to fill a large packet, whole messages
handed to the kernel; and one packet of a connection in the queue at a time, since acknowledgements of
the other direction wait behind it (without: 4 to 15 % slower where both directions are in use)."""
WINDOW = ("initcwnd", "256", "initrwnd", "256")
"""Packets in flight from the first on; what is in flight on a link is limited by its queue."""
HOLDER = (
    "".join(f"echo {value} > /proc/sys/net/ipv4/{name} && " for name, value in TCP.items())
    + "ip link set lo up && echo up && exec cat"
)


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace, by the process that holds it."""

    pid: int
    address: str


def why_not() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)} (iproute2, util-linux)"
    try:
        with hosts(Topology.uniform(2, bandwidth_bytes_per_s=1e9)):
            return None
    except (subprocess.CalledProcessError, RuntimeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"this kernel or container makes no shaped links ({' '.join(said.split())})"


def address(host: int) -> str:
    """Of host number ``host``, at its interface."""
    return f"10.77.{host // 250}.{host % 250 + 1}"


@contextmanager
def hosts(box: Topology) -> Iterator[list[Host]]:
    """A host for each GPU of ``box``, in device order, until the context ends.

    Raises ConfigError where namespaces cannot be what the box says, RuntimeError and
    CalledProcessError where the machine makes none.
    """
    check(box)
    with ExitStack() as stack:
        hub = stack.enter_context(_namespace())
        found = [Host(stack.enter_context(_namespace()), address(i)) for i in range(len(box.gpus))]
        for number in range(len(box.switches)):
            _ip(hub, "link", "add", _bridge(number), "type", "bridge", "stp_state", "0")
            _ip(hub, "link", "set", _bridge(number), "up")
        for number, link in enumerate(box.links):
            _join(box, hub, found, number, link)
        yield found


def star(count: int) -> Topology:
    """``count`` hosts on one switch, links as fast as the machine."""
    return Topology.uniform(count, bandwidth_bytes_per_s=math.inf)


def check(box: Topology) -> None:
    """Raises ConfigError for what namespaces and tbf cannot be."""
    graph = box.graph()
    where = f"{box.name}: no laboratory can be made of this"
    if not nx.is_tree(graph):
        raise ConfigError(f"{where}: links form a loop, allowed: one way between any two hosts")
    for link in box.links:
        if link.duplex == "half":
            raise ConfigError(f"{where}: {link.a}--{link.b} is half duplex, allowed: full")
        if link.latency_s > 0:
            raise ConfigError(
                f"{where}: {link.a}--{link.b} has a latency of {link.latency_s * 1e6:g} us,"
                " allowed: 0 us (what a link of the laboratory takes is calibrated)"
            )
    for gpu in box.gpus:
        ends = list(graph[gpu])
        if len(ends) != 1 or ends[0] not in box.switches:
            raise ConfigError(f"{where}: {gpu} needs one link, to a switch")
    if not box.peer_to_peer and any(math.isfinite(n.host_memory_bytes_per_s) for n in box.nodes):
        raise ConfigError(f"{where}: host_memory is not emulated, allowed: peer_to_peer: true")


def start(host: Host, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process on a host; it does not outlive this one."""
    return subprocess.Popen(
        [*_inside(host.pid), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=die_with_parent,
    )


@contextmanager
def _namespace() -> Iterator[int]:
    """A namespace of its own; yields the process that holds it."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "up\n":
            raise RuntimeError(f"unshare: {holder.stderr.read().strip() or 'ended without a word'}")
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net"]


def _bridge(switch: int) -> str:
    return f"br{switch}"


def _join(box: Topology, hub: int, found: Sequence[Host], number: int, link: Link) -> None:
    """A veth pair: the host's interface at a GPU, a port of the bridge at a switch."""
    ends = [
        (end, _place(box, hub, found, end), f"port{number}{side}")
        for end, side in ((link.a, "a"), (link.b, "b"))
    ]
    named = [(pid, INTERFACE if end in box.gpus else port) for end, pid, port in ends]
    (a, a_name), (b, b_name) = named
    _run("ip", "link", "add", a_name, "netns", str(a), "type", "veth",
         "peer", "name", b_name, "netns", str(b))  # fmt: skip
    for (end, _, _), (pid, name) in zip(ends, named, strict=True):
        _ip(pid, "link", "set", name, "mtu", str(MTU), "gso_max_size", str(PACKET_BYTES))
        if end in box.gpus:
            own = found[box.gpus.index(end)].address
            _ip(pid, "addr", "add", f"{own}/16", "dev", name)
            _ip(pid, "link", "set", name, "up")
            _ip(pid, "route", "replace", "10.77.0.0/16", "dev", name, *WINDOW)
        else:
            bridge = _bridge(box.switches.index(end))
            _ip(pid, "link", "set", name, "master", bridge, "up")
        rate = link.rate_from(end)
        if math.isfinite(rate):
            _run(*_inside(pid), "tc", "qdisc", "add", "dev", name, "root", "tbf",
                 "rate", f"{rate * 8:.0f}bit", "burst", str(PACKET_BYTES), "latency", QUEUE)  # fmt: skip


def _place(box: Topology, hub: int, found: Sequence[Host], end: str) -> int:
    return hub if end in box.switches else found[box.gpus.index(end)].pid


def _ip(pid: int, *arguments: str) -> None:
    _run(*_inside(pid), "ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
