"""Machines of a cluster on this one: hosts in network namespaces that have names and find each other by
them, with a real Slurm or a real Ray of several nodes on top."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from paradiff.executor.launch import die_with_parent
from paradiff.lab import namespaces

READY_S = 600.0
"""What has not come up by then hangs, on a busy machine too."""


@dataclass(frozen=True)
class Node:
    """A host with a name; ``names`` is what it reads as /etc/hosts."""

    host: namespaces.Host
    name: str
    names: Path

    def start(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        inside = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        named = [
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            inside,
            "sh",
            self.name,
            str(self.names),
        ]
        return namespaces.start(self.host, [*named, *command], dict(environment))

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> str:
        """What ``command`` prints; an AssertionError with its last words where it fails."""
        running = self.start(command, environment)
        out, errors = running.communicate(timeout=timeout_s)
        assert running.returncode == 0, (out + errors)[-3000:]
        return out


@contextmanager
def nodes(count: int, folder: Path) -> Iterator[list[Node]]:
    """``count`` nodes on one switch, until the context ends."""
    with namespaces.hosts(namespaces.star(count)) as hosts:
        names = folder / "hosts"
        found = [Node(host, f"node{i}", names) for i, host in enumerate(hosts)]
        lines = ["127.0.0.1 localhost", *(f"{n.host.address} {n.name}" for n in found)]
        names.write_text("\n".join(lines) + "\n")
        yield found


def why_no_slurm() -> str | None:
    missing = [n for n in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(n) is None]
    return f"no {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


SLURM = """\
ClusterName=lab
SlurmctldHost={first}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@contextmanager
def slurm(members: Sequence[Node], cpus: int, folder: Path) -> Iterator[Mapping[str, str]]:
    """Slurm on ``members``, of which each is said to have ``cpus``; the environment of its commands."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    lines = [f"NodeName={n.name} NodeAddr={n.host.address} CPUs={cpus}" for n in members]
    first = f"{members[0].name}({members[0].host.address})"
    (folder / "slurm.conf").write_text(
        SLURM.format(first=first, folder=folder, nodes="\n".join(lines))
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{n}={p}" for n, p in files.items())]
    with ExitStack() as stack:
        stack.enter_context(_daemon(_plain(munged)))
        _wait(files["socket"].exists)
        stack.enter_context(_daemon(members[0].start(["slurmctld", "-D"], environment)))
        for node in members:
            stack.enter_context(_daemon(node.start(["slurmd", "-D"], environment)))

        def idle() -> bool:
            asked = members[0].start(["sinfo", "--noheader", "--format=%t %D"], environment)
            return asked.communicate(timeout=READY_S)[0].split() == ["idle", str(len(members))]

        _wait(idle)
        yield environment


ALIVE = """
import ray
ray.init(log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))
"""


@contextmanager
def ray(
    members: Sequence[Node], cpus: int, environment: Mapping[str, str], folder: Path
) -> Iterator[Mapping[str, str]]:
    """A Ray cluster on ``members``, each with ``cpus``; the environment of its users."""
    address = f"{members[0].host.address}:6379"
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
    environment = {**environment, **secret}
    users = {**environment, "RAY_ADDRESS": address}
    python = environment["PYTHON"]
    with ExitStack() as stack:
        for i, node in enumerate(members):
            role = ["--head", "--port=6379", f"--temp-dir={folder}", "--include-dashboard=false"]
            command = [
                python, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}",
                f"--node-ip-address={node.host.address}",
                *(role if i == 0 else [f"--address={address}"]),
            ]  # fmt: skip
            stack.enter_context(_daemon(node.start(command, environment)))

        def complete() -> bool:
            asked = members[0].start([python, "-c", ALIVE], users)
            return asked.communicate(timeout=READY_S)[0].strip() == str(len(members))

        _wait(complete)
        yield users


def _plain(command: Sequence[str]) -> subprocess.Popen[str]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command, stdout=quiet, stderr=quiet, text=True, preexec_fn=die_with_parent
    )


@contextmanager
def _daemon(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + READY_S
    while not until():
        assert time.monotonic() < end, "a daemon did not come up"
        time.sleep(0.2)
