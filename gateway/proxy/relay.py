"""One request to its upstream, and the answer back.

The common case - no body or a small one, an answer that arrives whole - awaits the upstream once
and sends two ASGI messages; it creates no task and no timer. Everything else streams, with
back-pressure both ways.

How an answer is broken off: a client must never take half an answer for a whole one. When the
upstream fails after the response was started, the relay returns without sending the last body
message; the application then returns too, and Granian (from 2.8.7 on) closes the connection
without the last chunk, or short of Content-Length. Raising would do the same and log a traceback
each time, which any client could make happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from core import clock
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import (
    BadRequest,
    BadUpstreamResponse,
    ClientDisconnected,
    ProxyError,
    UpstreamClosed,
)
from gateway.proxy.headers import Header
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestHead
from gateway.proxy.watch import Exchange, Receive, ticks

Send = Callable[[dict[str, Any]], Awaitable[None]]

# So much of a request body, or all of it, is read before an upstream connection is taken: cheaper
# than a second task, and who sends nothing holds no connection. Its price is that an upstream does
# not see less of a body than this before its end.
INLINE_BODY: Final = 64 * 1024

# Granian queues up to four pieces of body per response: their size decides what a client costs that
# reads slowly (64 KiB instead of whatever was read: 1.7 instead of 4.2 MB).
PIECE: Final = 64 * 1024

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
    error: ProxyError | None = None
    headers: Sequence[Header] = ()
    head_ms: float = 0.0


async def relay(
    receive: Receive,
    send: Send,
    *,
    pool: UpstreamPool,
    head: RequestHead,
    extra_response_headers: Sequence[Header] = (),
    drop_response_headers: frozenset[bytes] = frozenset(),
    default_response_header: Header | None = None,
    response_timeout_s: float | None = None,
    before_start: Callable[[int], Awaitable[None]] | None = None,
) -> RelayResult:
    """Relay one admitted request.

    Args:
        head: from `RequestRules.head(scope)`.
        extra_response_headers: appended to the upstream's, e.g. the RateLimit fields.
        drop_response_headers: lower-case names removed from the upstream's, so that ours stand
            alone.
        default_response_header: appended when the upstream's have none of this (lower-case) name.
        response_timeout_s: how long the upstream may be silent, from the end of the request to the
            head of its answer and between pieces of body; the pool's when omitted. Coarse: noticed
            up to 0.15 s late.
        before_start: awaited with the status once the head of the answer is there, before any of
            it is passed on. What it raises ends the relay: the answer is not passed on.

    Returns:
        A result once the response has started. The application must then return without sending
        anything more, whatever the outcome.

    Raises:
        ProxyError: the response has not started; the caller answers with `error.status`, or not at
            all for ClientDisconnected.
    """
    watcher = pool.watch
    seconds = pool.response_timeout_s if response_timeout_s is None else response_timeout_s
    exchange = watcher.open(receive, ticks(seconds))
    run = _Relay(exchange, pool, head)
    try:
        conn = await run.request()
        status = conn.status
        if before_start is not None:
            await before_start(status)
        headers = conn.headers
        if drop_response_headers:
            headers = [pair for pair in headers if pair[0] not in drop_response_headers]
        if default_response_header is not None and default_response_header[0] not in dict(headers):
            headers.append(default_response_header)
        headers += extra_response_headers
        body = conn.take()
        start = {"type": "http.response.start", "status": status, "headers": headers}
        if not conn.complete:
            head_ms = run.head_ms(conn)
            result = await run.stream(send, start, body)
            return result._replace(headers=headers, head_ms=head_ms)
        head_ms = run.head_ms(conn) if conn.head_at else 0.0
        upstream_ms = run.finish()
        await _start(send, start)
        await send({"type": "http.response.body", "body": body})
        return RelayResult(
            status,
            exchange.bytes_in,
            len(body),
            upstream_ms,
            Outcome.COMPLETE,
            None,
            headers,
            head_ms or upstream_ms,
        )
    finally:
        watcher.close(exchange)
        if run.conn is not None:
            run.finish()


class _Relay:
    """The state of one relay: its connection, and the task that sends the request body."""

    __slots__ = ("_began", "_exchange", "_head", "_pool", "_pump", "conn")

    def __init__(self, exchange: Exchange, pool: UpstreamPool, head: RequestHead) -> None:
        self._exchange = exchange
        self._pool = pool
        self._head = head
        self._pump: asyncio.Task[None] | None = None
        self._began = 0.0
        self.conn: UpstreamConnection | None = None

    async def request(self) -> UpstreamConnection:
        """Send the request; returns when the head of the answer, or all of it, is there."""
        exchange, pool, head = self._exchange, self._pool, self._head
        body = b""
        length = head.body_length
        if length:
            body = await _read_body(exchange, length)
            if not exchange.receiving:
                length = 0  # that was all of it
        conn = pool.get_idle()
        if conn is None:
            conn = await pool.acquire()
        self.conn = conn
        self._began = clock.monotonic()
        reused = conn.requests > 0
        while True:
            exchange.conn = conn
            if exchange.error is not None:
                raise exchange.error
            conn.begin(head.to(conn.target) + body, head.method == b"HEAD")
            if length:
                exchange.body_sent = False
                self._pump = asyncio.create_task(_send_body(exchange, conn, length))
            else:
                exchange.await_upstream()
            try:
                await conn.wait()
            except UpstreamClosed:
                # A kept connection that the upstream closed meanwhile: nothing was answered, and
                # the request can be sent again as it was.
                if conn.answered or not reused or length or head.method not in IDEMPOTENT:
                    raise
                self.conn = exchange.conn = None
                pool.release(conn)
                conn = self.conn = await pool.acquire(fresh=True)
                reused = False
            else:
                if conn.error is not None:
                    raise conn.error
                return conn

    async def stream(self, send: Send, start: dict[str, Any], chunk: bytes) -> RelayResult:
        """Pass the body on piece by piece; the first one, maybe empty, is here already."""
        exchange = self._exchange
        conn = self.conn
        assert conn is not None
        status: int = start["status"]
        sent = 0
        task = asyncio.current_task()
        last = False
        await _start(send, start)
        try:
            while True:
                exchange.blocked = task
                at = 0
                while len(chunk) - at > PIECE:
                    exchange.await_client_read()
                    piece = chunk[at : at + PIECE]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    at += PIECE
                    sent += PIECE
                if at:
                    chunk = chunk[at:]
                if last:
                    break
                exchange.await_client_read()
                # An empty piece still makes Granian send the head: a client that waits for events
                # sees the answer begin.
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                exchange.blocked = None
                sent += len(chunk)
                exchange.await_upstream()
                await conn.wait()
                chunk = conn.take()
                last = conn.complete  # read with the bytes: more may arrive while they are sent
            exchange.blocked = None
            upstream_ms = self.finish()
            await send({"type": "http.response.body", "body": chunk})
            sent += len(chunk)
            return RelayResult(status, exchange.bytes_in, sent, upstream_ms, Outcome.COMPLETE)
        except ProxyError as error:
            return self._broken(status, sent, error)
        except asyncio.CancelledError:
            if exchange.error is None or task is None:
                raise
            task.uncancel()
            return self._broken(status, sent, exchange.error)
        finally:
            exchange.blocked = None

    def _broken(self, status: int, sent: int, error: ProxyError) -> RelayResult:
        gone = isinstance(error, ClientDisconnected)
        outcome = Outcome.CLIENT_GONE if gone else Outcome.BROKEN
        upstream_ms = self.finish()
        return RelayResult(status, self._exchange.bytes_in, sent, upstream_ms, outcome, error)

    def head_ms(self, conn: UpstreamConnection) -> float:
        """The milliseconds until the head of the answer was read."""
        return ((conn.head_at or clock.monotonic()) - self._began) * 1000

    def finish(self) -> float:
        """Give the connection back; returns the milliseconds it was used."""
        conn = self.conn
        self.conn = self._exchange.conn = None
        self._exchange.deadline = 0
        if conn is None:
            return 0.0
        pump = self._pump
        if pump is not None and not self._exchange.body_sent:
            # Answered before it had the whole request: what it still expects of the body would be
            # read as the next request.
            conn.reusable = False
        if pump is not None:
            pump.cancel()
        self._pool.release(conn)
        return (clock.monotonic() - self._began) * 1000


async def _start(send: Send, message: dict[str, Any]) -> None:
    try:
        await send(message)
    except RuntimeError as exc:
        # Granian refuses the head as a whole and has sent nothing: another answer is possible.
        raise BadUpstreamResponse("a header of the answer has bytes no header may have") from exc


async def _read_body(exchange: Exchange, length: int) -> bytes:
    """The body, or the first `INLINE_BODY` bytes or more of it, framed as it is sent.

    `exchange.receiving` stays true when there is more to come: nobody else may receive until then.

    Raises:
        RequestTimeout: it stopped arriving.
        ClientDisconnected: the client went away before its end.
    """
    exchange.receiving = True
    exchange.await_client_body()
    exchange.blocked = task = asyncio.current_task()
    chunks: list[bytes] = []
    more = True
    try:
        while exchange.bytes_in < INLINE_BODY:
            message = await exchange.receive()
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            chunks.append(chunk)
            exchange.bytes_in += len(chunk)
            if message["type"] == "http.disconnect" or (not more and exchange.bytes_in < length):
                raise ClientDisconnected("the client closed the connection while sending")
            if not more or exchange.bytes_in == length:
                more = False
                break
            exchange.await_client_body()
    except asyncio.CancelledError:
        if exchange.error is None or task is None:
            raise
        task.uncancel()
        raise exchange.error from None
    finally:
        exchange.blocked = None
        exchange.deadline = 0
        exchange.receiving = more
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if length >= 0:
        return body
    return (_framed(body) if body else b"") + (b"" if more else _LAST_CHUNK)


async def _send_body(exchange: Exchange, conn: UpstreamConnection, length: int) -> None:
    """Pump the rest of the request body, at the slower one's pace; `length` is -1 for chunked.

    Ends without error when the connection is closed: the relay learns it from the connection.
    """
    await _drained(exchange, conn)
    while not conn.closed:
        exchange.await_client_body()
        message = await exchange.receive()
        if message["type"] == "http.disconnect":
            exchange.abort(ClientDisconnected("the client closed the connection while sending"))
            return
        chunk: bytes = message["body"]
        if chunk:
            exchange.bytes_in += len(chunk)
            conn.write(chunk if length >= 0 else _framed(chunk))
            await _drained(exchange, conn)
        if not message["more_body"] or exchange.bytes_in == length:
            break
    if conn.closed:
        return
    if length < 0:
        conn.write(_LAST_CHUNK)
    elif exchange.bytes_in != length:
        # Granian frames the body, so this cannot be; if it were, the upstream must not wait.
        exchange.abort(BadRequest("the body does not have the announced length"))
        return
    exchange.body_sent = True
    exchange.receiving = False
    exchange.await_upstream()


async def _drained(exchange: Exchange, conn: UpstreamConnection) -> None:
    if conn.must_drain:
        exchange.await_upload()
        await conn.drain()


def _framed(chunk: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)
