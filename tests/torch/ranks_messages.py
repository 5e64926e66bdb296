"""One rank of four: calls that are messages on gloo, with uneven, empty and long buffers; clocks.

Every byte says where it comes from and where it goes, so that a wrong order or a mixed-up piece shows.
"""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import torch

from paradiff.executor import session as sessions
from paradiff.executor.session import Place, Session
from paradiff.executor.transports import Channel
from paradiff.graph import BROADCAST_PIECE, Op, OpKind

RANKS = (2, 0, 3, 1)
LONG = 3 * BROADCAST_PIECE + 17


def tensor(source: int, target: int, size: int) -> torch.Tensor:
    return ((torch.arange(size) * 7 + 31 * source + 5 * target) % 251).to(torch.uint8)


def size_of(source: int, target: int) -> int:
    """Uneven; nothing from 0 to 3; long from 1 to 2."""
    return {(0, 3): 0, (1, 2): LONG}.get((source, target), 1000 + 10 * source + target)


def clocks_are_followed(session: Session) -> bool:
    """Clock r is 5 r s ahead when a run begins, and 5.4 r s when it ends."""
    me, real = session.rank, time.perf_counter
    ahead = {"s": 5.0 * me}
    sessions.time = SimpleNamespace(  # type: ignore[assignment]
        perf_counter=lambda: real() + ahead["s"], monotonic=time.monotonic, sleep=time.sleep
    )
    session.compare_clocks()
    begin = abs(session.offset_s + 5.0 * me) <= session.residual_s
    ahead["s"] = 5.4 * me
    session.follow_clocks()
    middle = abs(session.offset_s + 5.2 * me) <= session.residual_s
    sessions.time = time
    return begin and middle and 0.19 * me <= session.residual_s <= 0.25 * me + 0.05


def main() -> None:
    place = Place.of_environment()
    assert place is not None
    session = Session.join(place, 60.0, "cpu", "messages")
    me = session.rank

    def channel(call: str, ranks: tuple[int, ...]) -> Channel:
        kind: OpKind = "collective"
        return Channel.of(session, Op(call, kind, call, ranks, f"{call}{ranks}"))

    found = {}
    exchange = channel("all_to_all", RANKS)
    came = exchange.all_to_all(
        [tensor(me, r, size_of(me, r)) for r in RANKS], [size_of(r, me) for r in RANKS]
    )
    wanted = [tensor(r, me, size_of(r, me)) for r in RANKS]
    found["all_to_all"] = all(map(torch.equal, came, wanted))
    for root in range(4):
        order = (root, *(r for r in RANKS if r != root))
        for size in (0, 5, LONG):
            own = tensor(root, 0, size) if me == root else None
            came_one = channel("broadcast", order).broadcast(own, size)
            found[f"broadcast {root} {size}"] = torch.equal(came_one, tensor(root, 0, size))
    pair = channel("all_gather", (3, 1))
    if me in (1, 3):
        sizes = [LONG, 9]
        both = pair.all_gather(tensor(me, 9, sizes[pair.index]), sizes)
        wanted = [tensor(3, 9, LONG), tensor(1, 9, 9)]
        found["all_gather"] = all(map(torch.equal, both, wanted))
    found["clocks"] = clocks_are_followed(session)
    said = session.gather_text(json.dumps(found))
    if me == 0:
        sys.stdout.write(json.dumps({"found": [json.loads(text) for text in said]}) + "\n")
    session.leave()


if __name__ == "__main__":
    main()
