"""What a test takes of the machine so that others can take theirs: a port, a file system, processes."""

from __future__ import annotations

import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paradiff.executor.place import SLURM_PORTS

_draw = random.SystemRandom()
"""Not the generator that a test library seeds alike in two processes."""


def free_port() -> int:
    """Not one that Linux itself would choose: until a rank listens there it would give it to others."""
    while True:
        port = _draw.choice(SLURM_PORTS)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at ``folder``, which is made. Skips where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a file system of its own needs root ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def is_alive(pid: int) -> bool:
    """Not one that has ended and that nobody has waited for (in a container, nobody may)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
