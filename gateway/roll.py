"""A rolling restart: new interpreters, and so new code and settings, one worker after another.

1. A second worker is started for the slot, on the same sockets. It connects to the stores before
   it serves. Until then nothing has changed: one that does not come up, or not in time, is given
   up, and with it the whole roll.
2. Both accept from the same queue for a moment; the old one is told to leave. It accepts no more
   and answers what it has, the last on each connection with `Connection: close`.
3. When it has ended, at the latest after `gateway.drain`, the next slot has its turn: there is
   never more than one worker too many.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from core import clock
from core.config import Snapshot, load
from core.errors import TallygateError
from core.telemetry import logs
from gateway.slots import Slot, WorkerProcess

_log = logs.get_logger()

# Imports on a busy machine, and stores that are slow to answer.
COMES_UP_S = 30.0

# Makes a worker serve only once both stores are connected.
CONNECTED = "--connected"


class Roll:
    """Made by `begin`; goes on whenever `advance` is called."""

    def __init__(self, slots: Sequence[Slot], start: Callable[..., WorkerProcess | None]) -> None:
        self._waiting = deque(slots)
        self._start = start
        self._slot: Slot | None = None
        self._replaced = 0

    @classmethod
    def begin(
        cls,
        config: Path,
        slots: Sequence[Slot],
        start: Callable[..., WorkerProcess | None],
        taken_over: Callable[[Snapshot], None],
    ) -> Roll | None:
        """None where the configuration is refused: no worker could start with it."""
        try:
            snapshot = load(config)
        except TallygateError as error:
            _log.error("roll_aborted", replaced=0, reason=str(error))
            return None
        taken_over(snapshot)
        _log.info("roll_started", workers=len(slots))
        return cls(slots, start)

    def advance(self, now: float, patience_s: float) -> bool:
        """True when it is over. `patience_s` is how long a worker may take to leave."""
        slot = self._slot
        if slot is None:
            return self._next(now)
        new, old = slot.successor, slot.leaving
        if new is not None:
            if new.came_up():
                self._swap(slot, new, now + patience_s)
            elif (status := new.ended()) is not None:
                slot.successor = None
                return self._aborted(slot, f"it ended with status {status}")
            elif now > new.deadline:
                new.kill()
                slot.successor = None
                return self._aborted(slot, f"it was not connected within {COMES_UP_S:.0f} s")
        elif old is not None:
            if old.ended() is not None:
                slot.leaving = self._slot = None
            elif now > old.deadline:
                _log.warning("killed", worker=slot.number, reason="out of time")
                old.tell(signal.SIGKILL)
                old.deadline = float("inf")
        else:
            self._slot = None
        return False

    def _next(self, now: float) -> bool:
        if not self._waiting:
            _log.info("roll_finished", replaced=self._replaced)
            return True
        slot = self._waiting.popleft()
        new = self._start(slot, CONNECTED)
        if new is None:
            return self._aborted(slot, "no process could be started")
        new.deadline = now + COMES_UP_S
        slot.successor, self._slot = new, slot
        return False

    def _swap(self, slot: Slot, new: WorkerProcess, deadline: float) -> None:
        slot.leaving, slot.serving, slot.successor = slot.serving, new, None
        slot.pause_s = -1.0
        self._replaced += 1
        if slot.leaving is not None:
            slot.leaving.tell(signal.SIGTERM)
            slot.leaving.deadline = deadline
        took_s = round(clock.monotonic() - new.started, 2)
        _log.info("worker_replaced", worker=slot.number, pid=new.pid, took_s=took_s)

    def _aborted(self, slot: Slot, reason: str) -> bool:
        _log.error("roll_aborted", replaced=self._replaced, worker=slot.number, reason=reason)
        return True
