"""One request to its upstream, and the answer back.

The common case - no body or a small one, an answer that arrives whole - awaits the upstream once
and writes once; it creates no task and no timer. Everything else streams, with back-pressure both
ways.

How an answer is broken off: a client must never take half an answer for a whole one. When the
upstream fails after the response was started, the exchange is aborted: the connection is closed
without the last chunk, or short of Content-Length.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from core import clock
from gateway.cost.tap import Tap
from gateway.http.errors import ClientDisconnected, ExchangeError
from gateway.http.exchange import Exchange
from gateway.http.message import Header
from gateway.proxy.attempts import attempts, stale
from gateway.proxy.body import read_body, send_body
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import BadUpstreamResponse, UpstreamClosed
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestHead
from gateway.proxy.retry import IDEMPOTENT
from gateway.proxy.target import Endpoint
from gateway.proxy.watch import Flight, Watch

_NOBODY: Final[frozenset[Endpoint]] = frozenset()


class Outcome(StrEnum):
    """How a started response ended. What fails before its start is raised instead."""

    COMPLETE = "complete"
    BROKEN = "broken"  # the upstream failed: the client got part of it and a closed connection
    CLIENT_GONE = "client_gone"


class RelayResult(NamedTuple):
    """`bytes_in` and `bytes_out` count body bytes only.

    `head_ms` and `upstream_ms` count from sending the request upstream: to the head of its answer,
    and to the answer's last byte.

    `error` says why the outcome is not COMPLETE.
    """

    status: int
    bytes_in: int
    bytes_out: int
    upstream_ms: float
    outcome: Outcome
    error: ExchangeError | None = None
    head_ms: float = 0.0


async def relay(
    exchange: Exchange,
    *,
    pool: UpstreamPool,
    head: RequestHead,
    extra_response_headers: Sequence[Header] = (),
    drop_response_headers: frozenset[bytes] = frozenset(),
    default_server: Header | None = None,
    before_start: Callable[[int], Awaitable[None]] | None = None,
    balance_key: bytes = b"",
    tap: Tap | None = None,
    switch: Callable[[UpstreamConnection], Awaitable[None]] | None = None,
) -> RelayResult:
    """Relay one admitted request.

    The upstream may be silent for the pool's response time-out, from the end of the request to the
    head of its answer, and for its idle time-out between pieces of body. Time-outs are noticed up
    to 0.15 s late.

    Args:
        balance_key: what the upstream's `balance: {hash: …}` hashes.
        head: from `RequestRules.head(request)`.
        extra_response_headers: appended to the upstream's, e.g. the RateLimit fields.
        drop_response_headers: lower-case names removed from the upstream's, so that ours stand
            alone.
        default_server: appended when the upstream does not name itself.
        before_start: awaited with the status once the head of the answer is there, before any of
            it is passed on. What it raises ends the relay: the answer is not passed on.
        tap: reads the answer as it passes, and may keep header fields from the client.
        switch: awaited with the connection instead of anything else when the answer is 101, which
            only one to a `head.upgrade` can be. It takes both sockets over.

    Returns:
        A result once the response has started; the exchange has then ended.

    Raises:
        ExchangeError: the response has not started; the caller answers with `error.status`, or not
            at all for ClientDisconnected.
    """
    watcher = pool.watch
    run = _Relay(watcher, exchange, pool, head)
    watcher.add(run)
    try:
        if exchange.gone:
            raise ClientDisconnected("the client closed the connection")
        conn = None if head.body_length else pool.get_idle()
        if conn is None:
            conn = await run.request(balance_key)
        else:
            # What `request` does, without its layer: nearly all requests go this way.
            run.conn = conn
            run.began = clock.monotonic()
            conn.begin(head.to(conn.target), head.method == b"HEAD", head.upgrade)
            run.await_upstream()
            try:
                await conn.wait()
            except UpstreamClosed:
                conn = await run.again(conn, 0)
            if conn.error is not None:
                raise conn.error
        status = conn.status
        if status == 101 and switch is not None:
            await switch(conn)
            ms = run.head_ms(conn)
            return RelayResult(101, 0, 0, ms, Outcome.COMPLETE, None, ms)
        if before_start is not None:
            run.deadline = 0  # the upstream has answered: nobody waits for it
            await before_start(status)
        headers = conn.headers
        if tap is not None:
            headers = tap.head(status, headers)
        if drop_response_headers:
            headers = [pair for pair in headers if pair[0] not in drop_response_headers]
        if default_server is not None and not conn.names_server:
            headers.append(default_server)
        headers += extra_response_headers
        length = max(conn.length, -1)
        body = conn.take()
        if not conn.complete or conn.trailers:
            head_ms = run.head_ms(conn)
            result = await run.stream(exchange, headers, length, body, tap)
            return result._replace(head_ms=head_ms)
        head_ms = run.head_ms(conn) if conn.head_at else 0.0
        upstream_ms = run.finish()
        try:
            exchange.respond(status, headers, body, length)
        except ValueError as exc:
            raise BadUpstreamResponse(f"unusable answer: {exc}") from exc
        if tap is not None:
            tap.piece(body)
            tap.end()
        return RelayResult(
            status,
            run.bytes_in,
            len(body),
            upstream_ms,
            Outcome.CLIENT_GONE if exchange.gone else Outcome.COMPLETE,
            None,
            head_ms or upstream_ms,
        )
    finally:
        watcher.close(run)
        if run.conn is not None:
            run.finish()


class _Relay(Flight):
    """The state of one relay: its connection, and the task that sends the request body."""

    __slots__ = ("_head", "_pool", "_pump", "began")

    def __init__(
        self,
        watch: Watch,
        exchange: Exchange,
        pool: UpstreamPool,
        head: RequestHead,
    ) -> None:
        super().__init__(watch, exchange, pool.limits)
        self._pool = pool
        self._head = head
        self._pump: asyncio.Task[None] | None = None
        self.began = 0.0

    async def request(self, key: bytes) -> UpstreamConnection:
        """Send the request; returns when the head of the answer, or all of it, is there."""
        body = b""
        length = self._head.body_length
        if length:
            body, complete = await read_body(self, length, self._head.max_body)
            if complete:
                length = 0
        pool = self._pool
        self.began = clock.monotonic()
        if pool.guarded:
            return await attempts(self, pool, self._head.method, body, length, key)
        conn = pool.get_idle() or await self.connection(key)
        self.began = clock.monotonic()
        try:
            return await self.send(conn, body, length)
        except UpstreamClosed:
            return await self.again(conn, length, body, key)

    async def again(
        self, conn: UpstreamConnection, length: int, body: bytes = b"", key: bytes = b""
    ) -> UpstreamConnection:
        """Send the request a second time, where its kept connection was closed meanwhile: nothing
        was answered, and it can be sent again as it was.

        Raises:
            UpstreamClosed: that is not so.
        """
        if not stale(conn, not length and self._head.method in IDEMPOTENT):
            assert conn.error is not None
            raise conn.error
        self.give_back(conn)
        self._pool.retried_stale()
        return await self.send(await self.connection(key, fresh=True), body, 0)

    async def connection(
        self, key: bytes = b"", avoid: Collection[Endpoint] = _NOBODY, fresh: bool = False
    ) -> UpstreamConnection:
        """Wait for a connection, no longer than the client and the total time-out do."""
        self.blocked = task = asyncio.current_task()
        try:
            return await self._pool.acquire(key, avoid=avoid, fresh=fresh)
        except asyncio.CancelledError:
            raise self._cancelled(task) from None
        finally:
            self.blocked = None

    async def pause(self, seconds: float) -> None:
        """Wait before the next try."""
        self.blocked = task = asyncio.current_task()
        self.deadline = 0
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            raise self._cancelled(task) from None
        finally:
            self.blocked = None

    def _cancelled(self, task: asyncio.Task[Any] | None) -> BaseException:
        """What a cancellation was: the end of this relay, or of the worker."""
        if self.error is None or task is None:
            return asyncio.CancelledError()
        task.uncancel()
        return self.error

    async def send(
        self, conn: UpstreamConnection, body: bytes, length: int, per_try_ticks: int = 0
    ) -> UpstreamConnection:
        """Send the request; returns when the head of the answer, or all of it, is there."""
        self.conn = conn
        if self.error is not None:
            raise self.error
        head = self._head
        conn.begin(head.to(conn.target) + body, head.method == b"HEAD", head.upgrade)
        if length:
            self.body_sent = False
            self._pump = asyncio.create_task(send_body(self, conn, length, head.max_body))
        elif per_try_ticks:
            self.await_try(per_try_ticks)
        else:
            self.await_upstream()
        await conn.wait()
        if conn.error is not None:
            raise conn.error
        return conn

    def give_back(self, conn: UpstreamConnection) -> None:
        """Another connection is to be used."""
        self.conn = None
        self.deadline = 0
        self._pool.release(conn)

    async def stream(
        self,
        exchange: Exchange,
        headers: Sequence[Header],
        length: int,
        chunk: bytes,
        tap: Tap | None,
    ) -> RelayResult:
        """Pass the body on piece by piece; the first one, maybe empty, is here already."""
        conn = self.conn
        assert conn is not None
        status = conn.status
        sent = 0
        task = asyncio.current_task()
        last = False
        try:
            exchange.start(status, headers, length)
        except ValueError as exc:
            raise BadUpstreamResponse(f"unusable answer: {exc}") from exc
        try:
            while True:
                if chunk:
                    exchange.write(chunk)
                    sent += len(chunk)
                    if tap is not None:
                        tap.piece(chunk)
                    if exchange.must_drain:
                        self.await_client_read()
                        self.blocked = task
                        await exchange.drain()
                        self.blocked = None
                if last:
                    break
                self.await_more()
                await conn.wait()
                chunk = conn.take()
                last = conn.complete  # read with the bytes: more may arrive while they are sent
            trailers = conn.trailers
            if self._pool.judge is not None:
                self._pool.judge.ended(conn.endpoint, status)
            upstream_ms = self.finish()
            exchange.end(trailers)
            if tap is not None:
                tap.end()
            return RelayResult(status, self.bytes_in, sent, upstream_ms, Outcome.COMPLETE)
        except ExchangeError as error:
            return self._broken(exchange, status, sent, error)
        except asyncio.CancelledError:
            if self.error is None or task is None:
                raise
            task.uncancel()
            return self._broken(exchange, status, sent, self.error)
        finally:
            self.blocked = None

    def _broken(
        self, exchange: Exchange, status: int, sent: int, error: ExchangeError
    ) -> RelayResult:
        exchange.abort()
        if self._pool.judge is not None and self.conn is not None:
            self._pool.judge.broke(self.conn.endpoint, error)
        gone = isinstance(error, ClientDisconnected)
        outcome = Outcome.CLIENT_GONE if gone else Outcome.BROKEN
        upstream_ms = self.finish()
        return RelayResult(status, self.bytes_in, sent, upstream_ms, outcome, error)

    def head_ms(self, conn: UpstreamConnection) -> float:
        """The milliseconds until the head of the answer was read."""
        return ((conn.head_at or clock.monotonic()) - self.began) * 1000

    def finish(self) -> float:
        """Give the connection back; returns the milliseconds it was used."""
        conn = self.conn
        self.conn = None
        self.deadline = 0
        if conn is None:
            return 0.0
        pump = self._pump
        if pump is not None:
            if not self.body_sent:
                # Answered before it had the whole request: what it still expects of the body would
                # be read as the next request.
                conn.reusable = False
            pump.cancel()
        self._pool.release(conn)
        return (clock.monotonic() - self.began) * 1000
