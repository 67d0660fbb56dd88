"""HTTP/1.1 connections of clients, parsed by llhttp.

One request at a time is answered; what a client sends ahead (pipelining) waits, a bounded amount of
it. Framing follows RFC 9112 and nothing more lenient: whatever two readers could take for different
messages is refused, and the connection closed, by llhttp or here.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn, cast

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)

from gateway.http.base import Connection, descriptor
from gateway.http.body import Body
from gateway.http.errors import BadRequest, ClientDisconnected
from gateway.http.exchange import Exchange, Tunnel
from gateway.http.message import NO_BODY, STATUS_LINES, Header, Request
from gateway.http.target import TargetError, parse_target

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

# What is parsed in one go while no body is being received. Of requests sent ahead, one such piece
# becomes objects at most; the rest waits as bytes.
_SLICE: Final = 4 * 1024
# Bytes that wait before the socket is no longer read.
_HELD_MAX: Final = 64 * 1024
# How long a connection that we have closed for writing is read, so that the client reads our answer
# and not a reset; and how much of it.
_LINGER_S: Final = 2
_LINGER_BYTES: Final = 64 * 1024 * 1024
# Bodies up to this are joined to their head: one system call, one small copy.
_JOIN_MAX: Final = 16 * 1024

# Fields of a request that say something to this hop.
_NOTED: Final = frozenset(
    (b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"host")
)

# Methods as llhttp names them. Not here, and so refused: CONNECT, as no tunnel is opened for
# anybody, and the methods of RTSP and ICE, which llhttp reads as well.
_METHODS: Final = {
    name.encode(): name
    for name in (
        *("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY"),
        *("COPY", "LOCK", "UNLOCK", "MOVE", "MKCOL", "PROPFIND", "PROPPATCH", "SEARCH", "ACL"),
        *("BIND", "REBIND", "UNBIND", "LINK", "UNLINK", "REPORT", "MERGE", "MKACTIVITY"),
        *("CHECKOUT", "MKCALENDAR", "M-SEARCH", "NOTIFY", "SUBSCRIBE", "UNSUBSCRIBE", "PURGE"),
    )
}

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class ClientConnection(Connection):
    """One connection, and the requests on it one after the other."""

    __slots__ = (
        "_active",
        "_body",
        "_close",
        "_drain_waiter",
        "_expect",
        "_fault",
        "_got_data",
        "_head_bytes",
        "_headers",
        "_held",
        "_host",
        "_in_head",
        "_keep_alive",
        "_length",
        "_lingering",
        "_paused",
        "_queue",
        "_refed",
        "_refusal",
        "_server",
        "_stalled",
        "_target",
        "_transport",
        "_upgrade",
        "_write_paused",
        "parser",
        "peer",
        "scheme",
    )

    def __init__(self, server: HttpServer, scheme: str) -> None:
        self._server = server
        self.scheme = scheme
        self.peer = ""
        self.parser: HttpRequestParser | None = None
        self.deadline = 0
        self._transport: asyncio.Transport | None = None
        self._active: Http1Exchange | None = None
        self._queue: deque[Http1Exchange] | None = None
        self._body: Body | None = None  # of the request that is being received
        self._held = b""
        self._close = False  # nothing that may still come is a request
        self._refusal: tuple[int, str, str] | None = None
        self._fault: tuple[int, str, str] | None = None
        self._lingering = -1  # bytes still to be read for nothing; -1 when not closing
        self._paused = False
        self._write_paused = False
        self._stalled = False  # the next request waits until the client takes the last answer
        self._drain_waiter: asyncio.Future[None] | None = None
        self._in_head = False
        self._head_bytes = 0
        self._got_data = False  # of a body, in the bytes that were just parsed
        self._refed = False
        self._begin_head()

    def _begin_head(self) -> None:
        self._headers: list[Header] = []
        self._target = b""
        self._host = b""
        self._length = 0  # of the body; -1 chunked
        self._keep_alive = 0  # 1 asked for, -1 declined
        self._expect = b""
        self._upgrade = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        self.parser = HttpRequestParser(self)
        # Load balancers open connections ahead of their use: silence is idleness, no slow head.
        self.deadline = self._server.tick + self._server.limits.keepalive_s
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._transport = None
        self.parser = None  # it refers to this connection's methods: a cycle
        self._held = b""
        for exchange in (self._active, *(self._queue or ())):
            if exchange is not None:
                exchange.lose()
        self._queue = None
        self._active = None
        self._release_drain()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._release_drain()
        if self._stalled:
            self._stalled = False
            if self._transport is not None and self._lingering < 0:
                self._pause(self._body is not None and self._body.paused)
                self._go_on()

    def data_received(self, data: bytes) -> None:
        if self._lingering >= 0:
            self._lingering -= len(data)
            if self._lingering < 0 and self._transport is not None:
                self._transport.abort()
        elif self._held or self._must_hold():
            self._hold(data)
        elif len(data) <= _SLICE:
            self._feed(data)
        else:
            self._feed_slices(data)

    def _must_hold(self) -> bool:
        """What comes now is no part of the request being answered: it is not read yet."""
        if self._active is None:
            return self._stalled
        return self._body is None or bool(self._queue)

    def _hold(self, data: bytes) -> None:
        """Sent ahead of an answer: it waits for its turn."""
        if self._close or self._refusal is not None:
            return
        self._held += data
        if len(self._held) > _HELD_MAX:
            self._pause(True)

    def _feed_held(self) -> None:
        if self._transport is not None and self._lingering < 0 and not self._must_hold():
            held, self._held = self._held, b""
            self._pause(False)
            self._feed_slices(held)

    def _feed_slices(self, data: bytes) -> None:
        at = 0
        while at < len(data) and self._transport is not None:
            if self._must_hold():
                self._hold(data[at:])
                return
            size = _SLICE if self._body is None else max(_SLICE, min(self._length, _HELD_MAX))
            self._feed(data[at : at + size])
            at += size

    def _feed(self, data: bytes) -> None:
        parser = self.parser
        if parser is None or self._refusal is not None or self._lingering >= 0:
            return
        try:
            parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._upgraded(data[upgrade.args[0] :])
        except HttpParserError as error:
            self._unreadable(error)
        if self._in_head:
            self._head_arrives(len(data))
        elif self._body is not None:
            self._body_arrives(len(data))

    def _body_arrives(self, count: int) -> None:
        """Of a body, what is no data (chunk extensions, trailers) has the size of a head."""
        if self._got_data:
            self._got_data = False
            self._head_bytes = 0
            return
        self._head_bytes += count
        if self._head_bytes > self._server.limits.head:
            body, self._body = self._body, None
            assert body is not None
            body.fail(BadRequest("chunk extensions or trailers are too large"))
            self._close = True
            self.parser = None  # nothing more of it is read

    def _head_arrives(self, count: int) -> None:
        """A head is not complete yet: it has its time and its size."""
        if not self._head_bytes and self._active is None:
            self.deadline = self._server.tick + self._server.limits.head_s
        self._head_bytes += count
        if self._head_bytes > self._server.limits.head:
            self._in_head = False
            self._refuse(431, "header-too-large", "The header fields are too large.")

    def _upgraded(self, rest: bytes) -> None:
        """llhttp stops at what asks for another protocol; nobody here speaks one but WebSocket.

        The handler may still take the connection over; until then what follows is held, and read as
        HTTP if the handler answers in HTTP.
        """
        self.parser = HttpRequestParser(self)
        if self._length:
            # The body is still to be read, of which the parser knows nothing any more.
            framing = b"content-length: %d" % self._length
            if self._length < 0:
                framing = b"transfer-encoding: chunked"
            self._refed = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
            self._refed = False
            self._feed_slices(rest)
        elif rest:
            self._hold(rest)

    def _unreadable(self, error: HttpParserError) -> None:
        self._in_head = False
        fault, self._fault = self._fault, None
        if self._body is not None:
            body, self._body = self._body, None
            body.fail(BadRequest(f"the body cannot be read: {fault[2] if fault else error}"))
            self._close = True
        elif self._close:
            pass  # bytes after the last request of this connection
        elif fault is not None:
            self._refuse(*fault)
        elif isinstance(error, HttpParserInvalidMethodError):
            self._refuse(501, "method-unknown", "The method is none that is known here.")
        else:
            self._refuse(400, "bad-request", f"The request cannot be read: {error}.")

    # httptools, from inside feed_data

    def on_message_begin(self) -> None:
        if not self._refed:
            self._in_head = True
            if self._target:
                self._begin_head()

    def on_url(self, url: bytes) -> None:
        if not self._refed:
            self._target = self._target + url if self._target else url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self._in_head:
            if name in _NOTED:
                value = value.rstrip(b" \t")  # llhttp leaves it on
                self._note(name, value)
            self._headers.append((name, value))
        elif self._body is not None and not self._refed:
            if len(self._body.trailers) >= self._server.limits.fields:
                self._fail(431, "too-many-fields", "There are too many trailer fields.")
            self._body.trailers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._refed:
            return
        self._in_head = False
        self._head_bytes = 0
        parser = self.parser
        assert parser is not None
        version: str = parser.get_http_version()
        method = _METHODS.get(parser.get_method())
        if method is None:
            self._fail(501, "method-unknown", "The method is none that is served here.")
        target = self._target
        limits = self._server.limits
        if target[:1] != b"/" or version != "1.1" or b"#" in target:
            target = self._unusual(method, target, version)
        if len(target) > limits.target:
            self._fail(414, "target-too-long", f"The URL is longer than {limits.target} bytes.")
        if len(self._headers) > limits.fields:
            self._fail(431, "too-many-fields", f"There are over {limits.fields} header fields.")
        request = Request(
            method,
            target,
            self._headers,
            version=version,
            scheme=self.scheme,
            peer=self.peer,
            body_length=self._length,
        )
        exchange = Http1Exchange(request, self)
        if self._length:
            if version == "1.0":
                self._expect = b""  # RFC 9110 section 10.1.1: not to be heeded
            elif self._expect and self._expect != b"100-continue":
                self._fail(417, "expectation-failed", "Nothing but 100-continue can be expected.")
            exchange.expects = bool(self._expect)
            exchange.body = self._body = Body(self._pause)
        if self._keep_alive < 0 or (version == "1.0" and self._keep_alive != 1):
            self._close = exchange.last = True
        exchange.says_keep_alive = version == "1.0" and not exchange.last
        if self._active is None:
            self._activate(exchange)
        elif self._queue is None:
            self._queue = deque((exchange,))
        else:
            self._queue.append(exchange)

    def on_body(self, data: bytes) -> None:
        if self._body is not None:
            self._got_data = True
            self._body.feed(data)

    def on_message_complete(self) -> None:
        body = self._body
        if body is not None and not self._upgrade_pending():
            self._body = None
            self._head_bytes = 0
            body.finish()

    def _upgrade_pending(self) -> bool:
        """llhttp ends a message that asks for an upgrade at its head, whatever body it has."""
        return (
            self._upgrade
            and not self._refed
            and self.parser is not None
            and bool(self.parser.should_upgrade())
        )

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or self._length:
                self._fail(501, "encoding-unknown", "The only transfer encoding is chunked.")
            self._length = -1
        elif name == b"connection":
            options = [option.strip() for option in value.lower().split(b",")]
            if b"close" in options:
                self._keep_alive = -1
            elif b"keep-alive" in options and not self._keep_alive:
                self._keep_alive = 1
        elif name == b"expect":
            self._expect = value.lower()
        elif name == b"upgrade":
            self._upgrade = True
        else:
            self._host = value

    def _unusual(self, method: str, target: bytes, version: str) -> bytes:
        if version not in ("1.1", "1.0"):
            self._fail(505, "version-not-supported", "HTTP/1.1 and HTTP/1.0 are spoken here.")
        if version == "1.0" and self._length < 0:
            self._fail(400, "bad-request", "HTTP/1.0 knows no transfer encodings.")
        try:
            return parse_target(method, target, self._host)
        except TargetError as error:
            self._fail(error.status, "bad-target", str(error))

    def _fail(self, status: int, code: str, detail: str) -> NoReturn:
        """Stop parsing: httptools makes an HttpParserError of it, and `_unreadable` the answer."""
        self._fault = (status, code, detail)
        raise ValueError(detail)

    # Answers

    def _activate(self, exchange: Http1Exchange) -> None:
        self._active = exchange
        self.deadline = 0
        self._server.begin(exchange)

    def finished(self, exchange: Http1Exchange) -> None:
        """The answer of the active exchange is written."""
        if self._active is not exchange or self._transport is None:
            return
        # While draining, an answer that began before did not say that it is the last one.
        if exchange.last or not exchange.body_complete:
            self.close()
            return
        self._active = None
        if self._write_paused:
            # A client that sends requests ahead and reads no answers: none is begun, and nothing
            # more read, until it has taken what there is.
            self._stalled = True
            self._pause(True)
            self.deadline = self._server.tick + self._server.limits.keepalive_s
            return
        self._go_on()

    def _go_on(self) -> None:
        """The next request, or the wait for one."""
        if self._queue:
            self._activate(self._queue.popleft())
            if self._held and not self._must_hold():  # the rest of its body
                self._server.loop.call_soon(self._feed_held)
            return
        limits = self._server.limits
        self.deadline = self._server.tick + (limits.head_s if self._in_head else limits.keepalive_s)
        if self._refusal is not None:
            self._refuse(*self._refusal)
        elif self._held:
            self._server.loop.call_soon(self._feed_held)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer what is no request, once all before it are answered, and close."""
        self._refusal = (status, code, detail)
        transport = self._transport
        if self._active is not None or self._queue or transport is None:
            return
        headers, body = self._server.refuse(status, code, detail)
        lines = [STATUS_LINES[status], *(b"%b: %b\r\n" % pair for pair in headers)]
        lines += (self._server.date, b"content-length: %d\r\n" % len(body))
        transport.write(b"%bconnection: close\r\n\r\n%b" % (b"".join(lines), body))
        self.close()

    def close(self) -> None:
        """No more answers: close, but let the client read what was written first."""
        transport = self._transport
        if transport is None or self._lingering >= 0:
            return
        self._held = b""
        self._lingering = _LINGER_BYTES
        self.deadline = self._server.tick + _LINGER_S + 1
        if self._body is not None:
            self._body.discard()
            self._body = None
        self._pause(False)
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    def expire(self) -> None:
        """The deadline has passed."""
        if self._transport is None:
            return
        self.deadline = 0
        if self._lingering >= 0:
            self._transport.abort()
        elif self._in_head and self._head_bytes and not self._stalled:
            self._in_head = False
            self._refuse(408, "request-timeout", "The request took too long to arrive.")
        else:
            self._close_soon(self._transport)

    @property
    def idle(self) -> bool:
        """No request is being answered or received."""
        return self._active is None and not self._in_head

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        task = None if self._active is None else self._active.task
        return () if task is None else (task,)

    def leave(self) -> None:
        """Nothing to do: the next answer says that it is the last."""

    def fileno(self) -> int:
        return descriptor(self._transport)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Hand the socket over, with what was read of it already."""
        transport = self._transport
        assert transport is not None
        held, self._held = self._held, b""
        self._pause(False)
        self._transport = self.parser = self._active = None
        self.deadline = 0
        self._server.closed(self)
        return transport, held

    def cut(self, reset: bool) -> None:
        """Close without the end of an answer; `reset` where only that tells it from its end."""
        transport = self._transport
        if transport is None:
            return
        if reset:
            sock = transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()
        else:
            self._close_soon(transport)

    def _close_soon(self, transport: asyncio.Transport) -> None:
        """Close once all is written, or after a while where the client takes nothing of it."""
        self._held = b""
        self._lingering = _LINGER_BYTES
        self.deadline = self._server.tick + _LINGER_S + 1
        transport.close()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def writelines(self, pieces: Sequence[bytes]) -> None:
        if self._transport is not None:
            self._transport.writelines(pieces)

    @property
    def must_drain(self) -> bool:
        return self._write_paused and self._transport is not None

    async def drain(self) -> None:
        while self._write_paused and self._transport is not None:
            self._drain_waiter = self._server.loop.create_future()
            await self._drain_waiter

    @property
    def server(self) -> HttpServer:
        return self._server

    def _release_drain(self) -> None:
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _pause(self, paused: bool) -> None:
        if paused is self._paused or self._transport is None:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


class Http1Exchange(Exchange):
    """An exchange over HTTP/1.1 or 1.0."""

    __slots__ = ("_chunked", "_conn", "_left", "body", "expects", "last", "says_keep_alive")

    def __init__(self, request: Request, conn: ClientConnection) -> None:
        self.request = request
        self.started = self.ended = self.gone = False
        self.on_gone = None
        self.task = None
        self.body: Body | None = None
        self.expects = False
        self.last = False  # of its connection
        self.says_keep_alive = False
        self._conn = conn
        self._chunked = False
        self._left = 0  # bytes of a declared length still to be written; -1 when none was

    def _head(self, status: int, headers: Sequence[Header], framing: bytes) -> bytes:
        lines = [STATUS_LINES[status]]
        for pair in headers:
            lines.append(b"%b: %b\r\n" % pair)  # noqa: PERF401 - faster than what it proposes
        head = b"".join(lines)
        # Each line brought one CR and one LF: any other came from inside a field.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a header field contains a line break")
        conn = self._conn
        if b"\r\ndate: " not in head:
            head += conn.server.date
        if self.last or conn.server.draining or (self.body is not None and not self.body.complete):
            head += b"connection: close\r\n"
            self.last = True
        elif self.says_keep_alive:
            head += b"connection: keep-alive\r\n"
        return b"%b%b\r\n" % (head, framing)

    def respond(
        self, status: int, headers: Sequence[Header], body: bytes = b"", length: int = -1
    ) -> None:
        if self.started or self.ended:
            raise RuntimeError("answered twice")
        if self.request.method == "HEAD" or status in NO_BODY:
            if length < 0:
                length = len(body)
                if not length and (status == 304 or self.request.method == "HEAD"):
                    length = -1
            framing = b"" if length < 0 or status == 204 else b"content-length: %d\r\n" % length
            body = b""
        else:
            framing = b"content-length: %d\r\n" % len(body)
        head = self._head(status, headers, framing)
        self.started = self.ended = True
        if self.gone:
            return
        if len(body) > _JOIN_MAX:
            self._conn.writelines((head, body))
        else:
            self._conn.write(head + body)
        self._conn.finished(self)

    def start(self, status: int, headers: Sequence[Header], length: int = -1) -> None:
        if self.started or self.ended:
            raise RuntimeError("answered twice")
        chunked = False
        if self.request.method == "HEAD" or status in NO_BODY:
            framing = b"" if length < 0 or status == 204 else b"content-length: %d\r\n" % length
            left = 0
        elif length >= 0:
            framing = b"content-length: %d\r\n" % length
            left = length
        elif self.request.version == "1.1":
            framing = b"transfer-encoding: chunked\r\n"
            chunked, left = True, -1
        else:
            framing, left = b"", -1  # the end of the connection is the end of the body
            self.last = True
        head = self._head(status, headers, framing)
        self.started = True
        self._chunked, self._left = chunked, left
        self._conn.write(head)

    def write(self, data: bytes) -> None:
        if self.ended or not data:
            return
        if self._chunked:
            self._conn.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
            return
        if self._left >= 0:
            data = data[: self._left]
            self._left -= len(data)
        self._conn.write(data)

    def end(self, trailers: Sequence[Header] = ()) -> None:
        if self.ended:
            return
        if self._left > 0:
            self.abort()
            return
        self.ended = True
        if self._chunked:
            fields = b""
            if trailers and self._takes_trailers():
                fields = b"".join(b"%b: %b\r\n" % pair for pair in trailers)
                if fields.count(b"\n") != len(trailers):
                    fields = b""
            self._conn.write(b"0\r\n%b\r\n" % fields)
        self._conn.finished(self)

    def _takes_trailers(self) -> bool:
        """RFC 9110 section 6.5.1: the client said so, or they might be lost or misread."""
        return any(name == b"te" and b"trailers" in value.lower()
                   for name, value in self.request.headers)  # fmt: skip

    def inform(self, status: int, headers: Sequence[Header]) -> None:
        if not self.started and not self.gone and self.request.version == "1.1":
            lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
            self._conn.write(b"%b%b\r\n" % (STATUS_LINES[status], lines))

    def abort(self) -> None:
        if not self.ended:
            self.ended = True
            self._conn.cut(reset=self._left < 0 and not self._chunked)

    @property
    def must_drain(self) -> bool:
        return self._conn.must_drain

    async def drain(self) -> None:
        await self._conn.drain()
        if self.gone:
            raise ClientDisconnected("the client closed the connection")

    async def read(self) -> bytes:
        body = self.body
        if body is None:
            return b""
        if self.expects:
            self.expects = False
            if not self.started and not body.unread and not body.complete:
                self._conn.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await body.read()

    @property
    def body_complete(self) -> bool:
        return self.body is None or self.body.complete

    @property
    def trailers(self) -> Sequence[Header]:
        return () if self.body is None else self.body.trailers

    def take_over(self, protocol: Tunnel, head: bytes) -> asyncio.Transport:
        """Ends HTTP on this connection: `head` is written, `protocol` gets the socket."""
        self.started = self.ended = True
        protocol.task = self.task
        server = self._conn.server
        transport, held = self._conn.detach()
        transport.set_protocol(protocol)
        transport.write(head)
        server.took_over(protocol)
        protocol.connection_made(transport)
        if held:
            protocol.data_received(held)
        return transport

    def lose(self) -> None:
        """The connection is closed."""
        self.gone = True
        if self.body is not None:
            self.body.fail(ClientDisconnected("the client closed the connection while sending"))
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None and not self.ended:
            on_gone()
