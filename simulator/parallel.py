"""The same function over many inputs, on as many processes as asked for.

Results are the same on one process and on many, and come as they are ready. A worker that dies takes
nothing with it: what it had not finished is given to new ones.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

TRIES = 3
"""Pools in a row that may break without one result more before it is given up."""


class WorkersDied(RuntimeError):
    """Worker processes were killed again and again: too little memory for so many, as a rule."""


Input = TypeVar("Input")
Output = TypeVar("Output")


def results(
    function: Callable[[Input], Output], inputs: Sequence[Input], processes: int
) -> Iterator[tuple[int, Output]]:
    """(index, function(input)) of every input, in the order in which they are done.

    ``function`` and its inputs must be picklable. Raises what ``function`` raises, and WorkersDied
    where workers keep dying.
    """
    if processes <= 1 or len(inputs) <= 1:
        yield from ((i, function(each)) for i, each in enumerate(inputs))
        return
    left = dict(enumerate(inputs))
    broken = 0
    while left and broken < TRIES:
        try:
            for index, output in _one_pool(function, left, processes):
                broken = 0
                del left[index]
                yield index, output
        except BrokenProcessPool:
            broken += 1
    if left:
        raise WorkersDied(f"worker processes died {TRIES} times in a row; fewer may fit in memory")


def _one_pool(
    function: Callable[[Input], Output], inputs: dict[int, Input], processes: int
) -> Iterator[tuple[int, Output]]:
    """Results of one pool, until all are there or a worker dies."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(inputs)), context, _few_collections)
    try:
        running: dict[Future[Output], int] = {}
        waiting = iter(list(inputs.items()))
        while True:
            for index, each in waiting:
                running[pool.submit(function, each)] = index
                if len(running) > processes:
                    break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda f: running[f]):
                yield running.pop(future), future.result()
    except (KeyboardInterrupt, SystemExit):
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ray_results(
    function: Callable[[Input], Output], inputs: Sequence[Input], address: str
) -> Iterator[tuple[int, Output]]:
    """As ``results``, on the Ray cluster at ``address`` (``local`` starts one on this machine).

    Ray gives the work of a worker that died to another. Raises ModuleNotFoundError without Ray, OSError
    (ConnectionError) where ``address`` is none or no cluster answers.
    """
    import ray

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        # Ray itself tries for minutes.
        socket.create_connection((host, int(port)), timeout=5).close()
    if not address:
        raise ConnectionError("empty, allowed: local, or the address of a cluster")
    try:
        ray.init(
            address=address, log_to_driver=False, include_dashboard=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise ConnectionError(str(error).partition("\n")[0]) from None
    try:
        remote = ray.remote(max_retries=TRIES)(function)
        running = {remote.remote(each): index for index, each in enumerate(inputs)}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), ray.get(done)
    finally:
        ray.shutdown()


def _few_collections() -> None:
    """As in ``paradiff.cli``: simulations are many small objects, nearly none in cycles."""
    gc.set_threshold(1_000_000)
