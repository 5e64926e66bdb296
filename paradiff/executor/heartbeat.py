"""What a rank tells its launcher: what it does, and how it ended. Needs no torch: it speaks first."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

HEARTBEAT_S = 0.25


@dataclass
class Heartbeat:
    """Tells the launcher, and whoever reads the file, what this rank is doing and how it ended.

    ``doing`` gives the ops in hand. The file is replaced whole, so a reader never sees half of it.
    """

    path: str
    rank: int
    doing: Callable[[], Mapping[str, str]]
    _stop: Event = field(default_factory=Event)
    _thread: Thread | None = None

    def start(self) -> None:
        self._write({"state": "running"})
        self._thread = Thread(target=self._beat, daemon=True)
        self._thread.start()

    def finish(self, state: str, message: str = "", **more: Any) -> None:
        """The last word of this rank."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._write({"state": state, "message": message, **more})

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self._write({"state": "running"})

    def _write(self, facts: Mapping[str, Any]) -> None:
        whole = {
            "rank": self.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time_s": time.time(),
            "doing": dict(self.doing()),
            **facts,
        }
        temporary = f"{self.path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(whole, file)
        os.replace(temporary, self.path)
