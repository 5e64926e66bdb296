"""One process among the ranks of a run: who is there, do all mean the same, whose clock shows what.

Small facts (fingerprints, headers) go through the key-value store that the ranks meet at; nothing waits
in it without a deadline, and nothing is pickled. Process groups for transfers are made here, each once,
in the order in which they are asked for, which must be the same on all ranks.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paradiff.executor.faults import OtherGraph, RanksMissing, ranks_text
from paradiff.executor.machine import facts
from paradiff.executor.place import Place

CLOCK_ROUNDS = 12
ALIVE_S = 1.0
"""How often a rank says that it lives; in a short timeout more often, five times."""
Group = Any


@dataclass
class Session:
    """The ranks of a run, met. ``offset_s`` added to this process's clock gives rank 0's."""

    place: Place
    timeout_s: float
    device: torch.device
    hub: Hub
    offset_s: float = 0.0
    residual_s: float = 0.0
    _groups: dict[tuple[str, tuple[int, ...]], Group] = field(default_factory=dict)
    _rounds: int = 0

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def store(self) -> Any:
        """Where small facts are."""
        return self.hub.store

    @property
    def backend(self) -> str:
        """The library that moves bytes."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    @classmethod
    def join(
        cls, place: Place, timeout_s: float, device: str, hello: str, hub: Hub | None = None
    ) -> Session:
        """Meet the others (at ``hub``, where this rank has met them before it had loaded anything).

        ``hello`` must be the same on all ranks (the graph's fingerprint). Raises RanksMissing, naming
        them; OtherGraph where a rank says another ``hello``. Host messages go over gloo whatever the
        device.
        """
        session = cls(place, timeout_s, torch.device(device), hub or meet(place, timeout_s))
        said = session.agree("hello", hello, patient=True)
        others = [rank for rank, text in said.items() if text != said[0]]
        if others:
            # rank 0 takes the store along: not before all have read it
            with suppress(RanksMissing):
                session.arrive("other")
            raise OtherGraph(
                f"{ranks_text(others)} would run another graph than rank 0 (fingerprint"
                f" {said[others[0]][:12]}, rank 0 has {said[0][:12]}): the same model, size, strategy"
                " and version of paradiff are needed on all ranks"
            )
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("groups", session.store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        session.compare_clocks()
        return session

    def leave(self) -> None:
        """The ordinary end: all ranks come here, whatever they still had to do."""
        self.arrive("leave")
        dist.barrier()
        self.hub.close()
        dist.destroy_process_group()

    # ------------------------------------------------------------------------------ small facts

    def arrive(self, where: str) -> None:
        """Wait until all ranks are here, as long as those that are not live. Raises RanksMissing."""
        self.agree(f"{where}/{self.next_round()}", "", patient=True)

    def agree(
        self, key: str, value: str, ranks: Iterable[int] | None = None, *, patient: bool = False
    ) -> dict[int, str]:
        """Say ``value`` under ``key`` and hear what each of ``ranks`` (default: all) says.

        Waits ``timeout_s`` for a rank; ``patient``: since it last said that it lives. Polls, so that
        other threads can use the store meanwhile. Raises RanksMissing, also where the store has gone.
        """
        try:
            return self._agree(key, value, ranks, patient)
        except dist.DistError as error:
            raise RanksMissing(
                f"where the ranks meet ({self.place.address}:{self.place.port}) nobody answers any more"
                f" ({' '.join(str(error).split())[:80]})"
            ) from None

    def _agree(
        self, key: str, value: str, ranks: Iterable[int] | None, patient: bool
    ) -> dict[int, str]:
        members = range(self.world_size) if ranks is None else ranks
        names = {rank: f"{key}/{rank}" for rank in members}
        self.store.set(f"{key}/{self.rank}", value)
        begin, pause = time.monotonic(), 0.0002
        looked, lives = begin, dict.fromkeys(members, 0)
        since = dict.fromkeys(members, begin)
        absent = dict(names)
        while absent := {rank: n for rank, n in absent.items() if not self.store.check([n])}:
            now = time.monotonic()
            if patient and now - looked > self.hub.every_s:
                looked, found = now, {rank: self.store.add(alive(rank), 0) for rank in absent}
                since |= {rank: now for rank, count in found.items() if count != lives[rank]}
                lives |= found
            late = [rank for rank in absent if now - since[rank] > self.timeout_s]
            if late:
                raise RanksMissing(f"{ranks_text(late)} did not come within {self.timeout_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return {rank: self.store.get(name).decode() for rank, name in names.items()}

    def gather(self, own: Tensor) -> list[Tensor]:
        """The (bytes,) uint8 buffer of every rank, on every rank, in order."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        most = max(1, *(int(size) for size in sizes))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(found, padded)
        return [buffer[: int(size)] for buffer, size in zip(found, sizes, strict=True)]

    def gather_text(self, own: str) -> list[str]:
        """What every rank says, on every rank, in order."""
        data = bytearray(own.encode())
        buffer = (
            torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
        return [bytes(each.numpy()).decode() for each in self.gather(buffer)]

    def machines(self) -> list[dict[str, Any]]:
        """What each machine says of itself (``machine.facts``) and which ranks it has, on every rank.

        The first rank of a machine speaks for it.
        """
        host = socket.gethostname()
        said = facts() if self.place.local_rank == 0 else {"host": host}
        found: dict[str, dict[str, Any]] = {}
        for rank, text in enumerate(self.gather_text(json.dumps(said))):
            own = json.loads(text)
            known = found.setdefault(own["host"], {"host": own["host"], "ranks": []})
            known["ranks"].append(rank)
            known.update(own)
        return list(found.values())

    # ------------------------------------------------------------------------------ groups

    def group(self, stream: str, ranks: Sequence[int], *, is_message: bool = False) -> Group:
        """The process group of ``ranks`` for one stream; all ranks ask for all groups, in one order.

        Its first call is made here: NCCL then makes its communicator, for which it waits for all of
        them, and which must not happen in the middle of an exchange. ``is_message``: from the first
        rank to the second.
        """
        key = (stream, tuple(ranks))
        if key not in self._groups:
            timeout = timedelta(seconds=self.timeout_s)
            made = dist.new_group(sorted(ranks), timeout=timeout, backend=self.backend)
            self._groups[key] = made
            byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
            if not is_message and self.rank in ranks:
                dist.all_reduce(byte, group=made)
            elif self.rank == ranks[0]:
                dist.send(byte, ranks[1], group=made)
            elif self.rank == ranks[1]:
                dist.recv(byte, ranks[0], group=made)
        return self._groups[key]

    # ------------------------------------------------------------------------------ clocks

    def compare_clocks(self) -> None:
        """Offset of this clock to rank 0's, by Cristian's algorithm; all ranks come here.

        Of ``CLOCK_ROUNDS`` questions the one answered fastest counts; half its round trip is what
        remains unknown.
        """
        self.residual_s = 0.0
        now = torch.zeros(1, dtype=torch.float64)
        for other in range(1, self.world_size):
            for _ in range(CLOCK_ROUNDS):
                if self.rank == 0:
                    dist.recv(now, other)
                    now[0] = time.perf_counter()
                    dist.send(now, other)
                elif self.rank == other:
                    asked = time.perf_counter()
                    dist.send(now, 0)
                    dist.recv(now, 0)
                    answered = time.perf_counter()
                    half_s = (answered - asked) / 2
                    if not self.residual_s or half_s < self.residual_s:
                        self.residual_s = half_s
                        self.offset_s = float(now) - (asked + half_s)

    def follow_clocks(self) -> None:
        """Compare again, at the end of a run: the offset is the mean of both, and half of what it has
        drifted meanwhile may be missing at either end."""
        offset_s, residual_s = self.offset_s, self.residual_s
        self.compare_clocks()
        drift_s = abs(self.offset_s - offset_s)
        self.offset_s = (self.offset_s + offset_s) / 2
        self.residual_s = max(self.residual_s, residual_s) + drift_s / 2

    def next_round(self) -> int:
        """A number that is the same on all ranks and new at each call."""
        self._rounds += 1
        return self._rounds


@dataclass
class Hub:
    """The store that the ranks meet at, where this one says that it lives until it closes it."""

    store: Any
    rank: int
    every_s: float = ALIVE_S
    _over: Event = field(default_factory=Event)
    _thread: Thread | None = None

    def open(self) -> Hub:
        """Begin to say so."""
        self._thread = Thread(target=self._say_alive, daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Before the store goes, or the process: the thread is in the library's code."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _say_alive(self) -> None:
        with suppress(RuntimeError):  # the store has gone, and with it who would ask
            while not self._over.is_set():
                self.store.add(alive(self.rank), 1)
                self._over.wait(self.every_s)


def meet(place: Place, timeout_s: float) -> Hub:
    """The hub of all ranks.

    Raises RanksMissing where rank 0 does not answer within ``timeout_s``.
    """
    try:
        hub = dist.TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=place.rank == 0 and not place.is_store_hosted,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (RuntimeError, dist.DistError) as error:
        raise RanksMissing(
            f"rank 0 does not answer at {place.address}:{place.port} within {timeout_s:g} s"
            f" ({' '.join(str(error).split())[:80]})"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"paradiff/{attempt}", hub)
    return Hub(store, place.rank, min(ALIVE_S, timeout_s / 5)).open()


def alive(rank: int) -> str:
    """The name that a rank counts up while it lives."""
    return f"alive/{rank}"


def on_device(buffer: Tensor, device: torch.device) -> Tensor:
    """``buffer`` where transfers can take it."""
    return buffer if buffer.device == device else buffer.to(device)
