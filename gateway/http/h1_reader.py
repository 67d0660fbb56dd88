"""How requests are read from a connection of HTTP/1.1: fed to llhttp, framed, held back.

What a client sends ahead (pipelining) waits, a bounded amount of it. Framing follows RFC 9112 and
nothing more lenient: whatever two readers could take for different messages is refused, and the
connection closed, by llhttp or here.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Final, NoReturn

from httptools import (
    HttpParserError,
    HttpParserInvalidMethodError,
    HttpParserUpgrade,
    HttpRequestParser,
)

from gateway.http.base import Connection
from gateway.http.body import Body
from gateway.http.errors import BadRequest
from gateway.http.h1_exchange import Http1Exchange
from gateway.http.message import Header, Request
from gateway.http.target import TargetError, parse_target

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

# What is parsed in one go while no body is being received. Of requests sent ahead, one such piece
# becomes objects at most; the rest waits as bytes.
_SLICE: Final = 4 * 1024
# Bytes that wait before the socket is no longer read.
_HELD_MAX: Final = 64 * 1024

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


class RequestReader(Connection):
    """The reading half of a connection; `ClientConnection` is the other."""

    __slots__ = (
        "_active",
        "_body",
        "_close",
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
        "_queue",
        "_refed",
        "_refusal",
        "_server",
        "_stalled",
        "_target",
        "_transport",
        "_upgrade",
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
        self.unsent = 0
        self._transport: asyncio.Transport | None = None
        self._active: Http1Exchange | None = None
        self._queue: deque[Http1Exchange] | None = None
        self._body: Body | None = None  # of the request that is being received
        self._held = b""
        self._close = False  # nothing that may still come is a request
        self._refusal: tuple[int, str, str] | None = None
        self._fault: tuple[int, str, str] | None = None
        self._lingering = -1  # bytes still to be read for nothing; -1 when not closing
        self._stalled = False  # the next request waits until the client takes the last answer
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
        exchange = Http1Exchange(request, self)  # type: ignore[arg-type] # the whole
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

    # The other half

    @abstractmethod
    def _activate(self, exchange: Http1Exchange) -> None: ...

    @abstractmethod
    def _refuse(self, status: int, code: str, detail: str) -> None: ...

    @abstractmethod
    def _pause(self, paused: bool) -> None: ...
