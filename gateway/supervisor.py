"""Keeps the workers of one gateway running.

A worker that dies is replaced, with a growing pause if it dies soon. If none of the first workers
ever comes up, because of something that a restart does not mend, the gateway ends with its reason
instead of trying for ever. No threads and no event loop: it waits for signals, and workers report
through a pipe when they listen.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core import clock
from core.config import Address, Snapshot
from core.telemetry import directory, logs

_log = logs.get_logger()

SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
_POLL_S = 0.25
# A worker that lived this long is replaced at once; one that dies sooner waits, doubling.
_SETTLED_S = 10.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0
# On top of the drain time: closing the stores, writing the last metrics.
_STOP_MARGIN_S = 5.0
# How a worker ends that found what a restart does not mend: its configuration, its stores' content.
FATAL = 1


@dataclass(slots=True)
class _Slot:
    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    backoff_s: float = 0.0
    start_at: float = 0.0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Runs `count` workers on one address until a signal."""

    def __init__(self, config: Path, snapshot: Snapshot, listen: Address, count: int) -> None:
        self._listen = listen
        self._patience_s = snapshot.settings.gateway.drain_ms / 1000 + _STOP_MARGIN_S
        self._ready_read, self._ready_write = os.pipe()
        os.set_blocking(self._ready_read, False)
        self._command = [
            sys.executable,
            *("-m", "gateway", "--worker"),
            *("--parent", str(os.getpid())),
            *("--ready-fd", str(self._ready_write)),
            *("--config", str(config)),
            *("--listen", str(listen)),
            *("--workers", str(count)),
        ]
        self._environment = dict(os.environ) | _metrics_directory(snapshot)
        self._slots = [_Slot(number) for number in range(1, count + 1)]
        self._listening = 0

    def run(self) -> int:
        """The exit status: 0 after a clean stop, 1 when no worker ever came up."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for slot in self._slots:
            self._start(slot)
        while True:
            received = signal.sigtimedwait(SIGNALS, _POLL_S)
            number = received.si_signo if received else None
            if number in (signal.SIGTERM, signal.SIGINT):
                return self._stop(0)
            if number == signal.SIGHUP:
                self._tell(signal.SIGHUP)
            self._count_ready()
            for slot in self._slots:
                if self._ended(slot) == FATAL and not self._listening:
                    return self._stop(1)  # it said why on standard error

    def _start(self, slot: _Slot) -> None:
        slot.process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            self._command, env=self._environment, pass_fds=(self._ready_write,)
        )
        slot.started = clock.monotonic()

    def _count_ready(self) -> None:
        try:
            came_up = len(os.read(self._ready_read, 1024))
        except BlockingIOError:
            return
        if not self._listening:
            _log.info("listening", address=str(self._listen), workers=len(self._slots))
        self._listening += came_up

    def _ended(self, slot: _Slot) -> int | None:
        """Looks after one worker; its exit status if it has just ended."""
        now = clock.monotonic()
        status = slot.process.poll() if slot.process is not None else None
        if slot.process is not None and status is not None:
            settled = now - slot.started > _SETTLED_S
            pause = 0.0 if settled else min(slot.backoff_s * 2, _BACKOFF_MAX_S) or _BACKOFF_FIRST_S
            slot.backoff_s, slot.start_at, slot.process = pause, now + pause, None
            _log.error("worker_died", worker=slot.number, status=status, restart_in_s=pause)
        elif slot.process is None and slot.start_at <= now:
            self._start(slot)
        return status

    def _tell(self, number: int) -> None:
        for slot in self._slots:
            if slot.running and slot.process is not None:
                slot.process.send_signal(number)

    def _stop(self, status: int) -> int:
        """Drains all workers; a second signal, or the end of the patience, kills them."""
        self._tell(signal.SIGTERM)
        deadline = clock.monotonic() + self._patience_s
        while any(slot.running for slot in self._slots):
            received = signal.sigtimedwait(SIGNALS, 0.05)
            again = received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT)
            if again or clock.monotonic() > deadline:
                self._tell(signal.SIGKILL)
        _log.info("stopped")
        return status


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
