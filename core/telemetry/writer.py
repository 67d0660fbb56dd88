"""A line writer that never blocks its caller, whatever becomes of the reader.

A thread does the writing. Non-blocking writes from the event loop were the alternative: they need
O_NONBLOCK, which is a property of the open file and not of the descriptor, so setting it on stderr
changes it under the shell and under every other process that shares the terminal or the pipe; and
without it a poll() that reports room for one write says nothing once another worker has used it.
A thread blocked in write(2) holds no lock and no GIL, on a pipe, a terminal and a slow disk alike.

What a crash leaves: up to `interval_s` of lines are lost when the process is killed (SIGKILL);
every other exit drains them, for at most `_DRAIN_S`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import threading
import weakref
from collections.abc import Iterable, Iterator

# About 15,000 lines: a second and a half of a rejection flood, small beside the process.
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
# A person watching does not notice it; at full load it is ten wake-ups a second.
FLUSH_INTERVAL_S = 0.1
# How long an exit waits for a stalled reader: shorter than any supervisor's patience.
_DRAIN_S = 1.0


class LineWriter:
    """Whole lines to a file descriptor, in order, from any thread.

    Args:
        fd: an open descriptor; it stays the caller's to close, after `close()`.
        max_bytes: lines beyond this much unwritten output are dropped and counted.
        interval_s: the longest a line waits before it is written, and so the most wake-ups.
    """

    def __init__(
        self,
        fd: int,
        *,
        max_bytes: int = MAX_BUFFERED_BYTES,
        interval_s: float = FLUSH_INTERVAL_S,
    ) -> None:
        self.fd = fd
        self._max_bytes = max_bytes
        self._interval_s = interval_s
        self._reset()
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _reset_after_fork(reference))
        atexit.register(_close_at_exit, reference)

    def _reset(self) -> None:
        self._lines: list[bytes] = []
        self._pending_bytes = 0  # queued here or in the thread's hands
        self._dropped = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        # Re-entrant: a signal handler may log while the interrupted frame holds it.
        self._lock = threading.RLock()
        self._arrived = threading.Event()
        self._hurry = threading.Event()
        self._idle = threading.Event()
        self._idle.set()

    def write(self, line: bytes) -> bool:
        """Queues one line, newline included. False when it was dropped (and counted)."""
        with self._lock:
            size = len(line)
            if self._pending_bytes + size > self._max_bytes:
                self._dropped += 1
                return False
            self._pending_bytes += size
            first = not self._lines
            self._lines.append(line)
        if first:
            if self._thread is None:
                self._start()
            self._idle.clear()
            self._arrived.set()
        return True

    def take_dropped(self) -> int:
        """Lines dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def drain(self, timeout_s: float = _DRAIN_S) -> bool:
        """Writes what is queued now, waiting at most `timeout_s`. False when the reader stalls."""
        if self._thread is None:
            return True
        self._hurry.set()
        self._arrived.set()
        return self._idle.wait(timeout_s)

    def close(self, timeout_s: float = _DRAIN_S) -> bool:
        """`drain()`, then ends the thread. A later `write` starts another."""
        drained = self.drain(timeout_s)
        thread, self._thread = self._thread, None
        if thread is not None and drained:
            self._closing = True
            self._arrived.set()
            thread.join(timeout_s)
            self._closing = False
        return drained

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                # Daemon: a thread stuck in write(2) must not hold up the exit.
                self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._arrived.wait()
            if self._closing:
                return
            # Gather: one wake-up and a few large writes for everything of the interval.
            self._hurry.wait(self._interval_s)
            self._hurry.clear()
            self._arrived.clear()
            with self._lock:
                lines, self._lines = self._lines, []
            for chunk in _chunks(lines):
                self._write_all(chunk)
                with self._lock:
                    self._pending_bytes -= len(chunk)
            with self._lock:
                if not self._lines:
                    self._idle.set()
                else:
                    self._arrived.set()

    def _write_all(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            try:
                written = os.write(self.fd, view)
            except BlockingIOError:  # the descriptor came to us non-blocking
                select.select([], [self.fd], [])
                continue
            except OSError:  # the reader is gone (EPIPE) or the disk is full: count, carry on
                with self._lock:
                    self._dropped += bytes(view).count(b"\n")
                return
            view = view[written:]


def _chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines packed into pieces of at most PIPE_BUF, which POSIX writes to a pipe in one piece.

    Workers share one pipe; larger writes would interleave in the middle of a line.
    """
    held: list[bytes] = []
    size = 0
    for line in lines:
        if size + len(line) > select.PIPE_BUF and held:
            yield b"".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield b"".join(held)


def _reset_after_fork(reference: weakref.ref[LineWriter]) -> None:
    # The child has neither the thread nor any claim on the parent's unwritten lines.
    writer = reference()
    if writer is not None:
        writer._reset()


def _close_at_exit(reference: weakref.ref[LineWriter]) -> None:
    writer = reference()
    if writer is not None:
        with contextlib.suppress(OSError):
            writer.close()
