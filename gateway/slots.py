"""A worker's place: the sockets that stay, and the processes that come and go on them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from core import clock
from gateway.listeners import Listener

# A worker that lived this long is replaced at once, and so is the first that did not: connections
# of its slot wait for the next one. After that pauses double, so that a worker that cannot live
# does not take the machine with it.
_SETTLED_S = 10.0
_PAUSE_FIRST_S = 0.1
_PAUSE_MAX_S = 5.0
# A slot that is without a worker for longer than this leaves the port to the others.
_WAITING_MAX_S = 0.5


class WorkerProcess:
    """One worker. `deadline` is when the supervisor loses its patience with it, if ever."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        listeners: Sequence[Listener],
    ) -> None:
        self._ready_fd, theirs = os.pipe()
        os.set_blocking(self._ready_fd, False)
        argv = [*command, "--ready-fd", str(theirs)]
        for listener in listeners:
            argv += ["--listen-fd", listener.argument()]
        fds = [listener.sock.fileno() for listener in listeners]
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                argv, env=dict(environment), pass_fds=(theirs, *fds)
            )
        except OSError:
            os.close(self._ready_fd)
            raise
        finally:
            os.close(theirs)
        self.pid = self._popen.pid
        self.started = clock.monotonic()
        self.ready = False
        self.deadline = float("inf")

    def came_up(self) -> bool:
        """True once: when it has said that it serves."""
        if self.ready or self._ready_fd < 0:
            return False
        try:
            said = os.read(self._ready_fd, 1)
        except BlockingIOError:
            return False
        self._close()
        self.ready = bool(said)
        return self.ready

    def ended(self) -> int | None:
        """The exit status, negative the number of a signal; None while it runs."""
        status = self._popen.poll()
        if status is not None:
            self._close()
        return status

    def tell(self, number: int) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """Ends it and waits for that."""
        self.tell(signal.SIGKILL)
        self._popen.wait()
        self._close()

    def _close(self) -> None:
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1


@dataclass(slots=True)
class Slot:
    """`serving` is the worker in charge (it may still be starting), `successor` the one that is to
    take its place, `leaving` the one whose place was taken and that finishes what it has.
    """

    number: int
    bind: Callable[[], list[Listener]]
    listeners: list[Listener] = field(default_factory=list)
    serving: WorkerProcess | None = None
    successor: WorkerProcess | None = None
    leaving: WorkerProcess | None = None
    pause_s: float = -1.0
    start_at: float = 0.0

    @property
    def processes(self) -> list[WorkerProcess]:
        found = (self.serving, self.successor, self.leaving)
        return [process for process in found if process is not None]

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> WorkerProcess:
        """A new process on this slot's sockets.

        Raises:
            TallygateError: the sockets had been given up, and the address cannot be bound again.
            OSError: no process can be made.
        """
        if not self.listeners:
            self.listeners = self.bind()
        return WorkerProcess(command, environment, self.listeners)

    def died(self, now: float) -> float:
        """The worker in charge is gone: how many seconds until the next one is started."""
        worker, self.serving = self.serving, None
        if worker is not None and now - worker.started > _SETTLED_S:
            self.pause_s = -1.0
        return self.pause(now)

    def pause(self, now: float) -> float:
        """Longer each time. In a long pause the slot's sockets are given up, so that connections go
        to other slots, or are refused where there is none; what waited on them is reset.
        """
        if self.pause_s < 0:
            self.pause_s = 0.0
        else:
            self.pause_s = min(self.pause_s * 2, _PAUSE_MAX_S) or _PAUSE_FIRST_S
        self.start_at = now + self.pause_s
        if self.pause_s > _WAITING_MAX_S and self.serving is self.successor is None:
            self.give_up_sockets()
        return self.pause_s

    def give_up_sockets(self) -> None:
        """Those of our own: a service manager's stay open for whoever comes next."""
        if all(listener.owned for listener in self.listeners):
            for listener in self.listeners:
                listener.sock.close()
            self.listeners = []
