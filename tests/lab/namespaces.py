"""Hosts on one machine: network namespaces joined by veth links to a bridge (Linux, root).

Everything made here has this process's number in its name, and all of it goes when the context ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

INTERFACE = "net0"


def why_not() -> str | None:
    """Why no namespace can be made here; None where they can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"pd{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this kernel or container makes no network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return None


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


@contextmanager
def star(hosts: int) -> Iterator[list[str]]:
    """Names of ``hosts`` namespaces on one bridge, each with ``INTERFACE`` at ``address(i)``."""
    hub, names = f"pd{os.getpid()}hub", [f"pd{os.getpid()}n{i}" for i in range(hosts)]
    try:
        ip("netns", "add", hub)
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", INTERFACE, "netns", name, "type", "veth",
               "peer", "name", f"port{i}", "netns", hub)  # fmt: skip
            ip("-n", hub, "link", "set", f"port{i}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address(i)}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in (*names, hub):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def start(name: str, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process in a namespace."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
