"""What can go wrong in a run, in words: the op, the step, and the rank that is missing or at fault."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

import torch

from paradiff.graph import Instance


class RunFailed(RuntimeError):
    """A run that ended before its end. ``symptom`` marks what another rank's failure causes here."""

    symptom = False


class RanksMissing(RunFailed):
    """Ranks that did not come in time."""

    symptom = True


class OtherGraph(RunFailed):
    """Ranks that were started with different graphs."""


class ScheduleMismatch(RunFailed):
    """The network does not do what the graph says; the message names the op and the point."""


class NotFinite(RunFailed):
    """A prediction or a latent with NaN or infinity."""


class OpFailed(RunFailed):
    """An op that raised; the message names the op, its step, the rank and the cause."""

    def __init__(self, instance: Instance, rank: int, error: BaseException) -> None:
        step = instance.op.step
        where = "" if step is None else f"step {step + instance.base}, "
        super().__init__(f"{where}op {instance.id}, rank {rank}: {cause_of(instance, rank, error)}")
        self.symptom = is_lost_peer(error)


def cause_of(instance: Instance, rank: int, error: BaseException) -> str:
    """The cause in words that a user knows."""
    if is_out_of_memory(error):
        return f"out of memory ({' '.join(str(error).split())[:80] or 'allocation failed'})"
    if is_lost_peer(error):
        others = [r for r in instance.op.ranks if r != rank]
        return f"waits for {ranks_text(others)} in vain ({' '.join(str(error).split())[:120]})"
    if isinstance(error, RunFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device had no memory left (oneDNN then cannot create its primitives)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "could not create a primitive", "bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a transfer failed because another rank has gone or is late."""
    words = ("Timed out", "timed out", "Connection closed", "Connection reset", "Broken pipe",
             "Socket Timeout", "NCCL communicator was aborted", "remote process exited",
             "Connection refused")  # fmt: skip
    is_peer = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return is_peer or isinstance(error, RanksMissing)


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 1, 2``."""
    found: Sequence[int] = sorted(ranks)
    return f"rank{'s' * (len(found) != 1)} {', '.join(map(str, found))}"
