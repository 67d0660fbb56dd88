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
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

from core import clock
from gateway.http.errors import BadRequest, ClientDisconnected, ExchangeError
from gateway.http.exchange import Exchange
from gateway.http.message import Header
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import BadUpstreamResponse, UpstreamClosed
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestHead
from gateway.proxy.watch import Flight, Watch

# So much of a request body, or all of it, is read before an upstream connection is taken: cheaper
# than a second task, and who sends nothing holds no connection. Its price is that an upstream does
# not see less of a body than this before its end.
INLINE_BODY: Final = 64 * 1024

_LAST_CHUNK: Final = b"0\r\n\r\n"

# RFC 9110 section 9.2.2: sending one of these twice is as good as once.
IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))


class Outcome(StrEnum):
    """How a started response ended. What fails before its start is raised instead."""

    COMPLETE = "complete"
    BROKEN = "broken"  # the upstream failed: the client got part of it and a closed connection
    CLIENT_GONE = "client_gone"


class RelayResult(NamedTuple):
    """`bytes_in` and `bytes_out` count body bytes only.

    `head_ms` and `upstream_ms` count from sending the request upstream: to the head of its answer,
    and to the answer's last byte.

    `error` says why the outcome is not COMPLETE; `headers` are those of the started response, for
    whoever settles an actual cost by one of them.
    """

    status: int
    bytes_in: int
    bytes_out: int
    upstream_ms: float
    outcome: Outcome
    error: ExchangeError | None = None
    headers: Sequence[Header] = ()
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
) -> RelayResult:
    """Relay one admitted request.

    The upstream may be silent for the pool's response time-out, from the end of the request to the
    head of its answer and between pieces of body. That is noticed up to 0.15 s late.

    Args:
        head: from `RequestRules.head(request)`.
        extra_response_headers: appended to the upstream's, e.g. the RateLimit fields.
        drop_response_headers: lower-case names removed from the upstream's, so that ours stand
            alone.
        default_server: appended when the upstream does not name itself.
        before_start: awaited with the status once the head of the answer is there, before any of
            it is passed on. What it raises ends the relay: the answer is not passed on.

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
            conn = await run.request()
        else:
            # What `request` does, without its layer: nearly all requests go this way.
            run.conn = conn
            run.began = clock.monotonic()
            conn.begin(head.to(conn.target), head.method == b"HEAD")
            run.await_upstream()
            try:
                await conn.wait()
            except UpstreamClosed:
                conn = await run.again(conn, 0)
            if conn.error is not None:
                raise conn.error
        status = conn.status
        if before_start is not None:
            await before_start(status)
        headers = conn.headers
        if drop_response_headers:
            headers = [pair for pair in headers if pair[0] not in drop_response_headers]
        if default_server is not None and not conn.names_server:
            headers.append(default_server)
        headers += extra_response_headers
        length = max(conn.length, -1)
        body = conn.take()
        if not conn.complete:
            head_ms = run.head_ms(conn)
            result = await run.stream(exchange, headers, length, body)
            return result._replace(headers=headers, head_ms=head_ms)
        head_ms = run.head_ms(conn) if conn.head_at else 0.0
        upstream_ms = run.finish()
        try:
            exchange.respond(status, headers, body, length)
        except ValueError as exc:
            raise BadUpstreamResponse(f"unusable answer: {exc}") from exc
        return RelayResult(
            status,
            run.bytes_in,
            len(body),
            upstream_ms,
            Outcome.CLIENT_GONE if exchange.gone else Outcome.COMPLETE,
            None,
            headers,
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
        self, watch: Watch, exchange: Exchange, pool: UpstreamPool, head: RequestHead
    ) -> None:
        super().__init__(watch, exchange, pool.response_ticks)
        self._pool = pool
        self._head = head
        self._pump: asyncio.Task[None] | None = None
        self.began = 0.0

    async def request(self) -> UpstreamConnection:
        """Send the request; returns when the head of the answer, or all of it, is there."""
        body = b""
        length = self._head.body_length
        if length:
            body, complete = await _read_body(self, length)
            if complete:
                length = 0
        conn = self._pool.get_idle()
        if conn is None:
            conn = await self._pool.acquire()
        self.began = clock.monotonic()
        try:
            return await self._try(conn, body, length)
        except UpstreamClosed:
            return await self.again(conn, length, body)

    async def again(
        self, conn: UpstreamConnection, length: int, body: bytes = b""
    ) -> UpstreamConnection:
        """Send the request a second time, where its kept connection was closed meanwhile: nothing
        was answered, and it can be sent again as it was.

        Raises:
            UpstreamClosed: that is not so.
        """
        head = self._head
        if conn.answered or conn.requests < 2 or length or head.method not in IDEMPOTENT:
            assert conn.error is not None
            raise conn.error
        self.conn = None
        self._pool.release(conn)
        return await self._try(await self._pool.acquire(fresh=True), body, 0)

    async def _try(self, conn: UpstreamConnection, body: bytes, length: int) -> UpstreamConnection:
        self.conn = conn
        if self.error is not None:
            raise self.error
        head = self._head
        conn.begin(head.to(conn.target) + body, head.method == b"HEAD")
        if length:
            self.body_sent = False
            self._pump = asyncio.create_task(_send_body(self, conn, length))
        else:
            self.await_upstream()
        await conn.wait()
        if conn.error is not None:
            raise conn.error
        return conn

    async def stream(
        self, exchange: Exchange, headers: Sequence[Header], length: int, chunk: bytes
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
                    if exchange.must_drain:
                        self.await_client_read()
                        self.blocked = task
                        await exchange.drain()
                        self.blocked = None
                if last:
                    break
                self.await_upstream()
                await conn.wait()
                chunk = conn.take()
                last = conn.complete  # read with the bytes: more may arrive while they are sent
            upstream_ms = self.finish()
            exchange.end()
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


async def _read_body(flight: Flight, length: int) -> tuple[bytes, bool]:
    """The body, or the first `INLINE_BODY` bytes or more of it, framed as it is sent; and whether
    that was all.

    Raises:
        RequestTimeout: it stopped arriving.
        ClientDisconnected: the client went away before its end.
        BadRequest: it is not framed as it should be.
    """
    exchange = flight.exchange
    flight.blocked = task = asyncio.current_task()
    chunks: list[bytes] = []
    complete = False
    try:
        while flight.bytes_in < INLINE_BODY:
            flight.await_client_body()
            chunk = await exchange.read()
            if not chunk:
                complete = True
                break
            chunks.append(chunk)
            flight.bytes_in += len(chunk)
            if flight.bytes_in == length:
                complete = True
                break
    except asyncio.CancelledError:
        if flight.error is None or task is None:
            raise
        task.uncancel()
        raise flight.error from None
    finally:
        flight.blocked = None
        flight.deadline = 0
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if length >= 0:
        return body, complete
    return (_framed(body) if body else b"") + (_LAST_CHUNK if complete else b""), complete


async def _send_body(flight: Flight, conn: UpstreamConnection, length: int) -> None:
    """Pump the rest of the request body, at the slower one's pace; `length` is -1 for chunked.

    Ends without error when the connection is closed: the relay learns it from the connection.
    """
    exchange = flight.exchange
    await _drained(flight, conn)
    while not conn.closed:
        flight.await_client_body()
        try:
            chunk = await exchange.read()
        except ExchangeError as error:
            flight.abort(error)
            return
        if not chunk:
            break
        flight.bytes_in += len(chunk)
        conn.write(chunk if length >= 0 else _framed(chunk))
        await _drained(flight, conn)
        if flight.bytes_in == length:
            break
    if conn.closed:
        return
    if length < 0:
        conn.write(_LAST_CHUNK)
    elif flight.bytes_in != length:
        # The parser frames the body, so this cannot be; if it were, the upstream must not wait.
        flight.abort(BadRequest("the body does not have the announced length"))
        return
    flight.body_sent = True
    flight.await_upstream()


async def _drained(flight: Flight, conn: UpstreamConnection) -> None:
    if conn.must_drain:
        flight.await_upload()
        await conn.drain()


def _framed(chunk: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)
