"""An exchange over HTTP/1.1 or 1.0: how answers are framed (RFC 9112)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.http.errors import ClientDisconnected
from gateway.http.exchange import Exchange, Tunnel
from gateway.http.message import NO_BODY, STATUS_LINES, Header, Request

if TYPE_CHECKING:
    from gateway.http.h1 import ClientConnection

# Bodies up to this are joined to their head: one system call, one small copy.
_JOIN_MAX: Final = 16 * 1024


class Http1Exchange(Exchange):
    """An exchange over HTTP/1.1 or 1.0."""

    __slots__ = ("_chunked", "_conn", "_left", "last", "says_keep_alive")

    def __init__(self, request: Request, conn: ClientConnection) -> None:
        self.request = request
        self.started = self.ended = self.gone = False
        self.on_gone = None
        self.task = None
        self.body = None
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
