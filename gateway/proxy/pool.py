"""Keep-alive connections to one upstream.

`get_idle()` is the fast path for an upstream with one target: a pop from a stack, most recently
used first, so that a burst's surplus grows old and is closed. `acquire()` is everything else:
choosing a target, opening a connection, or queueing in arrival order when `max_connections` are
open. No clock is read per request: idle connections carry the number of the reaper's last round
instead of a time.

Which targets there are, and which of them are used, is in endpoints.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from typing import Final

from core import clock
from core.policy import Upstream
from core.telemetry.metrics import Metrics
from core.upstream import Balance
from gateway.proxy import resolve, watch
from gateway.proxy.breaker import CircuitBreaker, State
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.endpoints import Endpoints
from gateway.proxy.errors import PoolExhausted, QueueFull
from gateway.proxy.judge import Judge
from gateway.proxy.opener import Opener
from gateway.proxy.queue import WaitQueue
from gateway.proxy.report import Report
from gateway.proxy.retry import RetryPolicy
from gateway.proxy.target import Endpoint

# Rounds of the reaper in one keep-alive time: an idle connection lives 4/4 to 5/4 of it.
_ROUNDS: Final = 4

# Connections that were opened together must not all be replaced together.
_LIFETIME_JITTER: Final = 0.1

_NOBODY: Final[frozenset[Endpoint]] = frozenset()


class UpstreamPool:
    """Connections of one upstream; use it on one event loop only. `start()` it there.

    Attributes:
        opened, reused: totals since the start.
        in_use: connections carrying a request now.
        size: connections that exist or are being opened; never above the upstream's maximum.
        judge: told how each try went; None when nothing depends on it.
        retries: the rules for trying again; None when that is off.
        guarded: whether there is one of the two.
        limits: time-outs of a request; `per_try_ticks` that of a try, 0 for none.
        refusing: None, or what raises the reason why requests are refused now: to be asked before
            a request is admitted, so that one that would go nowhere is not counted.

    Raises:
        ValueError: a URL that is none of an upstream.
        TlsFileError: a file of TLS is not what it was when the configuration was loaded.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        resolver: resolve.Resolver = resolve.system,
        now: Callable[[], float] = clock.monotonic,
    ) -> None:
        self.upstream = upstream
        self.limits = watch.Limits(
            watch.ticks(upstream.response_timeout_ms / 1000),
            watch.ticks((upstream.idle_timeout_ms or upstream.response_timeout_ms) / 1000),
            watch.ticks(upstream.total_timeout_ms / 1000) if upstream.total_timeout_ms else 0,
        )
        self.opened = 0
        self.reused = 0
        self.in_use = 0
        self.size = 0
        self._report = Report(upstream.name)
        # Looked up once: asking for the running loop is a system call in Python 3.11.
        self._watch: watch.Watch | None = None
        self._endpoints = Endpoints(
            upstream,
            resolver=resolver,
            now=now,
            on_change=self._endpoints_changed,
            on_gone=self._retire,
        )
        self._opener = Opener(upstream, self._endpoints, self._lost)
        # Anyone's connection serves anyone, unless the target was chosen for the request.
        self._any_target = upstream.balance is not Balance.HASH
        self._lifetime_s = upstream.lifetime_ms / 1000
        self._waiters = WaitQueue(self.release)
        self._waiting = self._waiters.waiters
        self._epoch = 0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False
        breaker = None
        if upstream.breaker is not None:
            breaker = CircuitBreaker(
                upstream.name, upstream.breaker, now=now, on_change=self._breaker_changed
            )
        self._breaker = breaker
        ejector = self._endpoints.ejector
        self.judge = Judge(breaker, ejector) if breaker or ejector else None
        self.retries: RetryPolicy | None = None
        if upstream.retries is not None:
            self.retries = RetryPolicy(upstream.retries, now=now, on_retry=self._retried)
        per_try_ms = upstream.retries.per_try_ms if upstream.retries is not None else 0
        self.per_try_ticks = watch.ticks(per_try_ms / 1000) if per_try_ms else 0
        self.guarded = self.judge is not None or self.retries is not None
        self.refusing: Callable[[], None] | None = None
        self._only: list[UpstreamConnection] | None = None
        self._endpoints_changed()

    def start(self, metrics: Metrics | None = None) -> None:
        """Begin health checks and look-ups, on the running loop. A second call does nothing."""
        if not self._endpoints.started:
            self._report = Report(self.upstream.name, metrics)
            self._endpoints.start(self._report)

    @property
    def watch(self) -> watch.Watch:
        """The watch of the loop that this pool is used on."""
        if self._watch is None:
            self._watch = watch.current()
        return self._watch

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The targets in use, live or not."""
        return self._endpoints.all

    @property
    def failures(self) -> int:
        """Connects that failed since the start."""
        return self._opener.failures

    @property
    def idle(self) -> int:
        """Connections ready for the next request."""
        return sum(len(endpoint.idle) for endpoint in self._endpoints.all)

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""
        return len(self._waiters)

    def sample(self) -> None:
        """Brings the gauges up to date."""
        self._report.sample(self)

    def get_idle(self) -> UpstreamConnection | None:
        """A live idle connection, now in use by the caller, or None. Never waits.

        None too where there is a target to choose: `acquire` does.
        """
        stack = self._only
        if stack is None:
            return None
        while stack:
            conn = stack.pop()
            if conn.closed:
                # Its end was seen in this very tick, and `_lost` has not been called yet.
                self._discard(conn)
                continue
            self.in_use += 1
            self.reused += 1
            return conn
        return None

    async def acquire(
        self,
        key: bytes = b"",
        *,
        avoid: Collection[Endpoint] = _NOBODY,
        fresh: bool = False,
    ) -> UpstreamConnection:
        """A connection for one request; give it back with `release()` in any case.

        Args:
            key: what the upstream's `balance: {hash: …}` hashes.
            avoid: targets that the request was tried on before.
            fresh: prefers a new connection, for a second attempt after a kept one was found dead:
                when an upstream restarts, all kept ones are.

        Raises:
            ConnectError: every target refused or is unreachable (TlsFailed: TLS failed).
            ConnectTimeout: connecting took longer than the upstream's connect time-out.
            PoolExhausted: no connection came free within the same time (QueueFull: too many wait).
        """
        endpoint = self._endpoints.pick(key, avoid)
        if not fresh and (conn := self._pop(endpoint)) is not None:
            return conn
        seconds = self.upstream.connect_timeout_ms / 1000
        try:
            async with asyncio.timeout(seconds) as limit:
                any_target = self._any_target and not avoid
                conn = await self._slot(endpoint, any_target)
        except TimeoutError:
            name, ms = self.upstream.name, self.upstream.connect_timeout_ms
            raise PoolExhausted(
                f"all {self.size} connections to {name!r} stayed busy for {ms} ms"
            ) from None
        if conn is not None:
            return conn
        deadline = limit.when()
        assert deadline is not None
        return await self._open(endpoint, avoid, deadline)

    def release(self, conn: UpstreamConnection) -> None:
        """Give a connection back: kept when its answer was complete and allows it, else closed."""
        self.in_use -= 1
        if not conn.reusable or conn.closed or conn.worn:
            self._discard(conn)
            return
        conn.finish()
        if self._waiting and self._waiters.hand_over(conn):
            self.in_use += 1
            self.reused += 1
            return
        conn.idle_epoch = self._epoch
        conn.endpoint.idle.append(conn)
        if self._reaper is None:
            self._schedule_reaper()

    def close(self) -> None:
        """Close idle connections now, and those in use when they are given back. Final."""
        self._closed = True
        self._endpoints.close()
        self._report.close()
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        for endpoint in self._endpoints.all:
            self._retire(endpoint)

    # Waiting for a connection

    async def _slot(self, endpoint: Endpoint, any_target: bool) -> UpstreamConnection | None:
        """A connection that came free, or None and the right to open one (counted in `size`)."""
        while self.size >= self.upstream.max_connections:
            conn = self._idle_elsewhere() or await self._queue()
            if conn is None:
                continue
            if any_target or conn.endpoint is endpoint:
                return conn
            # Its place is what is needed. Nobody else may have it in between.
            self.in_use -= 1
            self.reused -= 1
            self._forget(conn)
            conn.close()
            return None
        self.size += 1
        return None

    async def _queue(self) -> UpstreamConnection | None:
        room = self.upstream.max_waiting - len(self._waiters)
        if room <= 0:
            raise QueueFull(self._queue_text())
        if room == 1:
            self.refusing = self._refuse
        return await self._waiters.wait()

    def _refuse(self) -> None:
        """What `refusing` is while there is something to refuse."""
        if self._breaker is not None:
            self._breaker.check()
        if len(self._waiters) >= self.upstream.max_waiting > 0:
            raise QueueFull(self._queue_text())
        if self._breaker is None or self._breaker.state is State.CLOSED:
            self.refusing = None

    def _queue_text(self) -> str:
        return (
            f"all {self.size} connections to {self.upstream.name!r} are busy and "
            f"{len(self._waiters)} requests wait for one"
        )

    # Opening

    async def _open(
        self, first: Endpoint, avoid: Collection[Endpoint], deadline: float
    ) -> UpstreamConnection:
        """A new connection, which `size` counts already."""
        try:
            conn = await self._opener.open(first, avoid, deadline)
        except BaseException:
            self._shrink()
            raise
        self._adopt(conn)
        return conn

    def _adopt(self, conn: UpstreamConnection) -> None:
        endpoint = conn.endpoint
        conn.pooled = True
        conn.worn = self._closed or endpoint not in self._endpoints.all
        endpoint.conns.add(conn)
        self.opened += 1
        self.in_use += 1
        if self._lifetime_s:
            spread = random.uniform(1 - _LIFETIME_JITTER, 1 + _LIFETIME_JITTER)  # noqa: S311
            conn.lifetime = asyncio.get_running_loop().call_later(
                self._lifetime_s * spread, self._wear, conn
            )

    # Idle connections

    def _pop(self, endpoint: Endpoint) -> UpstreamConnection | None:
        stack = endpoint.idle
        while stack:
            conn = stack.pop()
            if conn.closed:
                self._discard(conn)
                continue
            self.in_use += 1
            self.reused += 1
            return conn
        return None

    def _idle_elsewhere(self) -> UpstreamConnection | None:
        for endpoint in self._endpoints.all:
            if (conn := self._pop(endpoint)) is not None:
                return conn
        return None

    def _wear(self, conn: UpstreamConnection) -> None:
        """Not to be used again; closed now if it is idle."""
        conn.worn = True
        if conn in conn.endpoint.idle:
            conn.endpoint.idle.remove(conn)
            self._discard(conn)

    def _retire(self, endpoint: Endpoint) -> None:
        """The endpoint is gone: its connections end when they are idle."""
        for conn in tuple(endpoint.conns):
            self._wear(conn)

    def _discard(self, conn: UpstreamConnection) -> None:
        conn.close()
        if conn.pooled:
            self._forget(conn)
            self._shrink()

    def _forget(self, conn: UpstreamConnection) -> None:
        conn.pooled = False
        conn.endpoint.conns.discard(conn)
        if conn.lifetime is not None:
            conn.lifetime.cancel()
            conn.lifetime = None

    def _shrink(self) -> None:
        self.size -= 1
        self._waiters.wake_one()

    def _lost(self, conn: UpstreamConnection) -> None:
        """The socket is closed. One in use is still its user's, who gives it back."""
        if conn.busy or not conn.pooled:
            return
        stack = conn.endpoint.idle
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
        for endpoint in self._endpoints.all:
            stack = endpoint.idle
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

    # Changes

    def _endpoints_changed(self) -> None:
        every = self._endpoints.all
        # Where each try is judged, or may be repeated, `attempts` asks for connections.
        self._only = every[0].idle if len(every) == 1 and not self.guarded else None

    def _breaker_changed(self, state: State) -> None:
        if state is not State.CLOSED:
            self.refusing = self._refuse
        self._report.breaker(state)

    def _retried(self, cause: str) -> None:
        self._report.retry(cause)

    def retried_stale(self) -> None:
        """A kept connection that the upstream had closed was replaced, unseen by anybody."""
        self._report.retry("stale")


__all__ = ["UpstreamPool"]
