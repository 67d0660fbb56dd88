"""Starting a server so that it cannot outlive us, and stopping it in order.

Times are seconds, ports are TCP on 127.0.0.1.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from core.errors import TallygateError

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.02
# Loaded before any fork: a child may not take the import lock or the loader's.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent(signum: int) -> Callable[[], None]:
    """A `preexec_fn` after which the kernel sends `signum` when the forking thread ends.

    The signal is tied to the *thread* that forks, so spawn from a thread that lives as long as
    the process: the main one. Linux only; elsewhere an orphan is possible after SIGKILL.
    """
    parent = os.getpid()

    def arrange() -> None:
        if _LIBC is None:
            return
        _LIBC.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl: no signal would come
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange


def spawn(
    argv: Sequence[str],
    *,
    death_signal: int,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    keep_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, so that Ctrl-C reaches only us and we stop in order.

    Output goes to `log` (appended, created 0600), to nowhere without it.
    """
    output: int = subprocess.DEVNULL
    if log is not None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=None if env is None else dict(env),
            cwd=cwd,
            pass_fds=tuple(keep_fds),
            start_new_session=True,
            preexec_fn=die_with_parent(death_signal),  # noqa: PLW1509 - calls only prctl
        )
    finally:
        if output >= 0:
            os.close(output)


def stop(process: subprocess.Popen[bytes], signum: int, deadline_s: float) -> bool:
    """Send `signum`, wait, SIGKILL after the deadline. False when it had to be killed."""
    if process.poll() is not None:
        return True
    process.send_signal(signum)
    try:
        process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def poll_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], deadline_s: float
) -> bool:
    """Poll until `ready()`. False when the process ended or the deadline passed before that."""
    end = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < end:
        if ready():
            return True
        time.sleep(_POLL_S)
    return False


def free_port() -> int:
    """A TCP port that is free on 127.0.0.1 now; another process may take it before you do."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(host: str, port: int, flag: str) -> None:
    """A plain bind, which a listener with SO_REUSEPORT cannot hide from.

    Raises:
        TallygateError: the port is in use or not ours to bind; the message names port and flag.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # Set by every server too: without it a port is "in use" for a minute after a restart.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is in use" if taken else f"cannot be used ({error.strerror})"
            raise TallygateError(
                f"port {port} on {host} {why}: stop what listens there, or use another ({flag})"
            ) from None


def tail(log: Path, lines: int = 10) -> str:
    """The last lines of a log, empty when there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
    except OSError:
        return ""


def last_line(log: Path) -> str:
    """The last line of a log, for a one-line error; a note when there is none."""
    return tail(log, 1).strip() or "no output"


def rotate(log: Path, limit_bytes: int = 16 * 1024 * 1024) -> None:
    """Keep one predecessor of a log that has grown past the limit; called before each start."""
    if log.exists() and log.stat().st_size > limit_bytes:
        log.replace(log.with_suffix(log.suffix + ".1"))


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Files made inside have these bits cleared. Process-wide: main thread, at start, only."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
