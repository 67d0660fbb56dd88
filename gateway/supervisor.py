"""Keeps the workers of one gateway running, and replaces them without a lost request.

A worker that dies is replaced, with a growing pause if it dies soon. If none of the first workers
ever comes up, because of something that a restart does not mend, the gateway ends with its reason
instead of trying for ever. No threads and no event loop: it waits for signals, and workers report
through a pipe when they serve.

    SIGTERM, SIGINT  stop: not ready, `gateway.drain_delay`, drain; once more: kill
    SIGHUP           every worker reads the configuration again
    SIGUSR2          a rolling restart: gateway/roll.py

To workers it says SIGUSR1 (not ready any more), SIGTERM (serve nobody new, drain, end), SIGHUP.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from core import clock
from core.config import Address, Snapshot
from core.errors import TallygateError
from core.telemetry import directory, logs
from gateway.listeners import Listener, bind
from gateway.notify import notify
from gateway.roll import Roll
from gateway.slots import Slot, WorkerProcess

_log = logs.get_logger()

# SIGUSR1 for the workers' sake: they inherit the mask, and are not ended before they handle it.
SIGNALS = frozenset(
    (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGCHLD,
        signal.SIGUSR1,
        signal.SIGUSR2,
    )
)
_STOP = (signal.SIGTERM, signal.SIGINT)
_POLL_S = 0.25
_POLL_BUSY_S = 0.02  # while a worker is awaited
# On top of the drain time: emptying the queue, sending releases, settlements and the spool, closing
# the stores, each with a time-out of its own.
_STOP_MARGIN_S = 10.0
# How a worker ends that found what a restart does not mend: its configuration, its stores' content.
FATAL = 1


class Supervisor:
    """Runs `count` workers until a signal.

    Each has sockets of its own on the addresses of `listen`, each with what is spoken there; or all
    share those of `given`, which the service manager listens on.
    """

    def __init__(
        self,
        config: Path,
        snapshot: Snapshot,
        listen: Sequence[tuple[Address, str]],
        count: int,
        given: Sequence[Listener] = (),
    ) -> None:
        self._config = config
        self._names = [str(address) for address, _ in listen]
        if given:
            self._names = [str(listener.sock.getsockname()) for listener in given]
        self._take_over(snapshot)
        self._command = [
            sys.executable,
            *("-m", "gateway", "--worker"),
            *("--parent", str(os.getpid())),
            *("--config", str(config)),
            *("--workers", str(count)),
        ]
        self._environment = dict(os.environ) | _metrics_directory(snapshot)

        def sockets() -> list[Listener]:
            return list(given) or [bind(address, kind) for address, kind in listen]

        self._slots = [Slot(number, sockets) for number in range(1, count + 1)]
        self._came_up = 0
        self._roll: Roll | None = None
        self._roll_again = False

    def run(self) -> int:
        """The exit status: 0 after a clean stop; 1 when no worker ever came up or one was killed.

        `SIGNALS` must be blocked.

        Raises:
            TallygateError: an address cannot be listened on.
        """
        for slot in self._slots:  # all of them bound before the first is served
            slot.listeners = slot.bind()
        while True:
            for slot in self._slots:
                if self._look_after(slot) == FATAL and not self._came_up:
                    return self._stop(1)  # it said why on standard error
            self._go_on_rolling()
            received = self._wait(_POLL_S)
            if received in _STOP:
                return self._stop(0)
            if received == signal.SIGHUP:
                self._tell(signal.SIGHUP)
            elif received == signal.SIGUSR2:
                self._roll_again = True

    def _wait(self, seconds: float) -> int | None:
        awaited = any(not p.ready for slot in self._slots for p in slot.processes)
        if awaited or self._roll is not None:
            seconds = min(seconds, _POLL_BUSY_S)
        received = signal.sigtimedwait(SIGNALS, max(0.0, seconds))
        return received.si_signo if received is not None else None

    def _look_after(self, slot: Slot) -> int | None:
        """The exit status of the slot's worker if it has just ended."""
        now, worker = clock.monotonic(), slot.serving
        if worker is None:
            if slot.successor is None and slot.start_at <= now:
                slot.serving = self._start(slot)
            return None
        if worker.came_up():
            if not self._came_up:
                _log.info("listening", addresses=self._names, workers=len(self._slots))
                notify("READY=1")
            self._came_up += 1
        status = worker.ended()
        if status is not None:
            pause_s = slot.died(now)
            _log.error("worker_died", worker=slot.number, status=status, restart_in_s=pause_s)
        return status

    def _start(self, slot: Slot, *more: str) -> WorkerProcess | None:
        try:
            return slot.start([*self._command, *more], self._environment)
        except (OSError, TallygateError) as error:
            pause_s = slot.pause(clock.monotonic())
            _log.error(
                "worker_not_started", worker=slot.number, reason=str(error), again_in_s=pause_s
            )
            return None

    def _go_on_rolling(self) -> None:
        if self._roll is None and self._roll_again:
            self._roll_again = False
            self._roll = Roll.begin(self._config, self._slots, self._start, self._take_over)
        elif self._roll is not None and self._roll.advance(clock.monotonic(), self._patience_s):
            self._roll = None

    def _take_over(self, snapshot: Snapshot) -> None:
        """What concerns us of a configuration that workers start with from now on."""
        settings = snapshot.settings.gateway
        self._delay_s = settings.drain_delay_ms / 1000
        self._patience_s = settings.drain_ms / 1000 + _STOP_MARGIN_S

    def _tell(self, number: int) -> None:
        for slot in self._slots:
            for process in slot.processes:
                process.tell(number)

    def _stop(self, status: int) -> int:
        """Drains all workers; a second signal, or the end of the patience, kills them."""
        notify("STOPPING=1")
        if status == 0 and self._waited_to_be_left():
            self._tell(signal.SIGKILL)
            status = 1
        # Workers accept what has connected by now, and find the end of their queues.
        for slot in self._slots:
            for listener in slot.listeners:
                listener.refuse_new()
        self._tell(signal.SIGUSR1)
        self._tell(signal.SIGTERM)
        for slot in self._slots:
            slot.give_up_sockets()
        deadline = clock.monotonic() + self._patience_s
        while any(p.ended() is None for slot in self._slots for p in slot.processes):
            received = self._wait(_POLL_BUSY_S)
            if received in _STOP or clock.monotonic() > deadline:
                _log.warning("killed", reason="asked twice" if received else "out of time")
                self._tell(signal.SIGKILL)
                status, deadline = 1, float("inf")
        _log.info("stopped")
        return status

    def _waited_to_be_left(self) -> bool:
        """Serves on for `gateway.drain_delay`, but as not ready; True if asked a second time."""
        end = clock.monotonic() + self._delay_s
        while (left := end - clock.monotonic()) > 0:
            for slot in self._slots:
                self._look_after(slot)
            self._tell(signal.SIGUSR1)  # also to those that came up meanwhile
            if self._wait(min(left, _POLL_S)) in _STOP:
                return True
        return False


def _metrics_directory(snapshot: Snapshot) -> dict[str, str]:
    """One directory for all workers, or `/metrics` would show one worker at most."""
    if snapshot.settings.telemetry.metrics_dir or os.environ.get(directory.DIRECTORY_VARIABLE):
        return {}
    _log.warning(
        "metrics_private",
        fix="set telemetry.metrics_dir to one directory for gateway, control and reconciler; "
        "without it control's /metrics shows nothing of this gateway",
    )
    return {directory.DIRECTORY_VARIABLE: str(directory.resolve(None))}
