"""Keep-alive connections to one upstream.

`get_idle()` is the fast path: a pop from a stack, most recently used first, so that a burst's
surplus grows old and is closed. `acquire()` adds what may wait: opening a connection, or queueing
in arrival order when `max_connections` are open. No clock is read per request: idle connections
carry the number of the reaper's last round instead of a time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from core.policy import Upstream
from gateway.proxy import watch
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import ConnectError, ConnectTimeout, PoolExhausted
from gateway.proxy.headers import Target, parse_target

# Rounds of the reaper in one keep-alive time: an idle connection lives 4/4 to 5/4 of it.
_ROUNDS: Final = 4


class UpstreamPool:
    """Connections of one upstream; use it on one event loop only.

    Attributes:
        opened, reused, failures: totals since the start. `failures` counts connects that failed.
        in_use: connections carrying a request now.
        size: connections that exist or are being opened; never above the upstream's maximum.

    Raises:
        ValueError: a URL is not plain `http://host:port`.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.response_ticks = watch.ticks(upstream.response_timeout_ms / 1000)
        self.opened = 0
        self.reused = 0
        self.in_use = 0
        self.failures = 0
        self.size = 0
        # Looked up once: asking for the running loop is a system call in Python 3.11.
        self._watch: watch.Watch | None = None
        self._targets = tuple(parse_target(url) for url in upstream.urls)
        if not self._targets:
            raise ValueError(f"upstream {upstream.name!r} has no URL")
        self._idle: dict[Target, list[UpstreamConnection]] = {t: [] for t in self._targets}
        self._only = self._idle[self._targets[0]] if len(self._idle) == 1 else None
        self._next = 0
        self._waiters: deque[asyncio.Future[UpstreamConnection | None]] = deque()
        self._epoch = 0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def watch(self) -> watch.Watch:
        """The watch of the loop that this pool is used on."""
        if self._watch is None:
            self._watch = watch.current()
        return self._watch

    @property
    def idle(self) -> int:
        """Connections ready for the next request."""
        return sum(map(len, self._idle.values()))

    def get_idle(self) -> UpstreamConnection | None:
        """A live idle connection, now in use by the caller, or None. Never waits."""
        stack = self._only
        if stack is None:
            # Round robin decides the target, not whoever happens to be idle.
            stack = self._idle[self._targets[self._next % len(self._targets)]]
        while stack:
            conn = stack.pop()
            if conn.closed:
                # Its end was seen in this very tick, and `_lost` has not been called yet.
                self._discard(conn)
                continue
            self._next += 1
            self.in_use += 1
            self.reused += 1
            return conn
        return None

    async def acquire(self, fresh: bool = False) -> UpstreamConnection:
        """A connection for one request; give it back with `release()` in any case.

        `fresh` prefers a new connection, for a second attempt after a kept one was found dead:
        when an upstream restarts, all kept ones are.

        Raises:
            ConnectError: every target refused or is unreachable.
            ConnectTimeout: connecting took longer than the upstream's connect time-out.
            PoolExhausted: no connection came free within the same time.
        """
        if not fresh and (conn := self.get_idle()) is not None:
            return conn
        waiting = True
        try:
            async with asyncio.timeout(self.upstream.connect_timeout_ms / 1000):
                while self.size >= self.upstream.max_connections:
                    if (conn := self._any_idle() or await self._queue()) is not None:
                        return conn
                waiting = False
                return await self._open()
        except TimeoutError:
            ms = self.upstream.connect_timeout_ms
            name = self.upstream.name
            if waiting:
                raise PoolExhausted(
                    f"all {self.size} connections to {name!r} stayed busy for {ms} ms"
                ) from None
            self.failures += 1
            raise ConnectTimeout(f"no connection to {name!r} within {ms} ms") from None

    def release(self, conn: UpstreamConnection) -> None:
        """Give a connection back: kept when its answer was complete and allows it, else closed."""
        self.in_use -= 1
        if not conn.reusable or conn.closed or self._closed:
            self._discard(conn)
            return
        conn.finish()
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_use += 1
                self.reused += 1
                waiter.set_result(conn)
                return
        conn.idle_epoch = self._epoch
        self._idle[conn.target].append(conn)
        if self._reaper is None:
            self._schedule_reaper()

    def close(self) -> None:
        """Close idle connections now, and those in use when they are given back."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        for stack in self._idle.values():
            for conn in tuple(stack):
                self._discard(conn)
            stack.clear()

    async def _queue(self) -> UpstreamConnection | None:
        """Wait for a connection given back; None means one was closed and may be replaced."""
        waiter: asyncio.Future[UpstreamConnection | None]
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Handed over in the same tick as the time-out: pass it on, or it is lost.
            if waiter.done() and not waiter.cancelled():
                conn = waiter.result()
                if conn is None:
                    self._wake_one()
                else:
                    self.release(conn)
            else:
                self._waiters.remove(waiter)
            raise

    async def _open(self) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        error: OSError | None = None
        self.size += 1
        try:
            for _ in self._targets:
                target = self._targets[self._next % len(self._targets)]
                self._next += 1
                try:
                    _, conn = await loop.create_connection(
                        lambda target=target: UpstreamConnection(  # type: ignore[misc]
                            target, loop, self._lost
                        ),
                        target.host,
                        target.port,
                    )
                except OSError as exc:
                    self.failures += 1
                    error = exc
                    continue
                conn.pooled = True
                self.opened += 1
                self.in_use += 1
                return conn
        except BaseException:
            self._shrink()
            raise
        self._shrink()
        reason = error.strerror or type(error).__name__ if error is not None else "no target"
        raise ConnectError(f"cannot connect to {self.upstream.name!r}: {reason}") from error

    def _any_idle(self) -> UpstreamConnection | None:
        for stack in self._idle.values():
            while stack:
                conn = stack.pop()
                if not conn.closed:
                    self.in_use += 1
                    self.reused += 1
                    return conn
                self._discard(conn)
        return None

    def _discard(self, conn: UpstreamConnection) -> None:
        conn.close()
        if conn.pooled:
            conn.pooled = False
            self._shrink()

    def _shrink(self) -> None:
        self.size -= 1
        self._wake_one()

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _lost(self, conn: UpstreamConnection) -> None:
        """The socket is closed. One in use is still its user's, who gives it back."""
        if conn.busy or not conn.pooled:
            return
        stack = self._idle[conn.target]
        if conn in stack:
            stack.remove(conn)
            self._discard(conn)

    def _schedule_reaper(self) -> None:
        delay = self.upstream.keepalive_ms / 1000 / _ROUNDS
        self._reaper = asyncio.get_running_loop().call_later(delay, self._reap)

    def _reap(self) -> None:
        self._reaper = None
        self._epoch += 1
        oldest = self._epoch - _ROUNDS - 1
        left = 0
        for stack in self._idle.values():
            # Least recently used first: stop at the first that is young enough.
            count = 0
            while count < len(stack) and stack[count].idle_epoch <= oldest:
                count += 1
            expired = stack[:count]
            del stack[:count]
            left += len(stack)
            for conn in expired:
                self._discard(conn)
        if left:
            self._schedule_reaper()
