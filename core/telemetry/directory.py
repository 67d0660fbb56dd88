"""The directory in which processes share their metrics, and who of them is alive.

prometheus_client gives each process its own memory-mapped files there, named after a process
identifier, by default the pid. Pids are not enough: in two containers that share the directory both
are 1, and a pid comes back with another process behind it. So each process takes an identity of its
own and holds a lock on `<identity>.alive`; the kernel releases the lock however the process ends,
SIGKILL included, and a lock means the same in every pid namespace.

A dead process's gauges are removed, its counters kept: totals must not fall. They go when the first
process starts in a directory where nobody is alive, which Prometheus reads as an ordinary restart.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from core.telemetry.fold import fold

DIRECTORY_VARIABLE = "TALLYGATE_METRICS_DIR"


class Membership:
    """This process's place in a metrics directory. A forked child takes a place of its own.

    Args:
        directory: created when missing.
        process: gateway, control or reconciler; part of the identity, for people.

    Raises:
        OSError: the directory cannot be created or written.
    """

    def __init__(self, directory: Path, process: str) -> None:
        self.directory = directory
        self._process = re.sub(r"[^a-z0-9]", "", process.lower())
        self._identity: str | None = None
        self._alive_fd = -1
        directory.mkdir(parents=True, exist_ok=True)
        self._join()
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def identity(self) -> str:
        """Unique among all processes that ever wrote to the directory; holds no underscore."""
        # Called by prometheus_client on every write: an attribute and a test, no system call.
        return self._identity or self._join()

    def _join(self) -> str:
        with _exclusive(self.directory):
            if not _living(self.directory):
                _clear(self.directory)
            identity = f"{self._process}-{os.getpid()}-{secrets.token_hex(4)}"
            fd = os.open(
                self.directory / f"{identity}.alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            fcntl.flock(fd, fcntl.LOCK_EX)
        self._alive_fd, self._identity = fd, identity
        return identity

    def _leave_to_parent(self) -> None:
        # The lock belongs to the open file, which parent and child share: closing the child's
        # descriptor leaves it with the parent alone.
        with contextlib.suppress(OSError):
            os.close(self._alive_fd)
        self._alive_fd, self._identity = -1, None

    def leave(self) -> None:
        """Gives the place up; gauges of this process go at the next `reap`."""
        if self._alive_fd >= 0:
            os.close(self._alive_fd)
            self._alive_fd = -1


def resolve(configured: str | None) -> Path:
    """The directory to use: the setting, else `TALLYGATE_METRICS_DIR`, else a fresh private one.

    With a private directory `/metrics` shows its own process and that one's children only.
    """
    chosen = configured or os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen)
    private = Path(tempfile.mkdtemp(prefix="tallygate-metrics-"))
    atexit.register(_remove_private, private, os.getpid())
    return private


@contextlib.contextmanager
def reaped(directory: Path) -> Iterator[list[str]]:
    """Removes the gauges of processes that died and adds up their counts; gives their identities.

    Nobody joins or is reaped before the end of the `with`, so that files can be read until then.
    """
    dead: list[str] = []
    with _exclusive(directory):
        living = []
        for path in directory.glob("*.alive"):
            if _is_locked(path):
                living.append(path.stem)
                continue
            mark_process_dead(path.stem, str(directory))  # type: ignore[no-untyped-call]
            path.unlink(missing_ok=True)
            dead.append(path.stem)
        fold(directory, living)
        yield dead


def _remove_private(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a child that inherited the exit handler
        shutil.rmtree(directory, ignore_errors=True)


def _living(directory: Path) -> bool:
    return any(_is_locked(path) for path in directory.glob("*.alive"))


def _clear(directory: Path) -> None:
    for pattern in ("*.db", "*.alive"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Joining and reaping exclude each other: an identity without its lock is never seen."""
    fd = os.open(directory / "membership.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
