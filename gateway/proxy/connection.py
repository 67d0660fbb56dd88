"""One keep-alive HTTP/1.1 connection to an upstream, one request at a time.

httptools parses; this class decides framing (RFC 9112 section 6.3), gathers head and body, and
keeps a bound on what is buffered. All state is reset by `begin()`, so that a request costs no
object besides the waiter future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from core import clock
from gateway.http.errors import ExchangeError
from gateway.http.message import NO_BODY, Header
from gateway.proxy.errors import BadUpstreamResponse, UpstreamClosed
from gateway.proxy.headers import RESPONSE_SPECIAL, connection_tokens
from gateway.proxy.target import Endpoint

# Above this many buffered body bytes the socket is no longer read: a slow client must cost a
# bounded amount of memory. One read under uvloop delivers up to 256,000 bytes on top of it.
READ_HIGH_WATER: Final = 64 * 1024

# Bodies of a known length up to this are delivered whole: most servers write head and body
# separately, and a streamed answer costs a third more. A body cut short then
# becomes a clean 502 too. One that does not follow its head at once is streamed after all.
GATHER_LIMIT: Final = 64 * 1024

# No sane response head is larger; an endless one must not fill memory.
MAX_HEAD: Final = 64 * 1024

# Interim (1xx) responses accepted before the final one.
MAX_INTERIM: Final = 16

MAX_TRAILERS: Final = 64

# RFC 9110 section 6.5.1: what frames, routes or authenticates a message.
NO_TRAILER: Final = RESPONSE_SPECIAL | {
    b"authorization",
    b"cache-control",
    b"content-encoding",
    b"content-range",
    b"content-type",
    b"host",
    b"set-cookie",
}


class UpstreamConnection(asyncio.Protocol):
    """States: idle (`busy` false), busy, closed. `reusable` is meaningful once `complete`.

    After `begin()`, `await wait()` returns when `status` and `headers` are there; then `take()` and
    `wait()` alternate until `complete`. Errors are raised by `wait()` and kept in `error`.
    """

    __slots__ = (
        "_buffered",
        "_chunks",
        "_drain_waiter",
        "_fault",
        "_gather",
        "_head_bytes",
        "_head_request",
        "_head_taken",
        "_interim",
        "_loop",
        "_named",
        "_on_lost",
        "_parser",
        "_parser_clean",
        "_reading_paused",
        "_saw_close",
        "_switched",
        "_transport",
        "_until_close",
        "_upgrade",
        "_waiter",
        "_write_paused",
        "answered",
        "busy",
        "closed",
        "complete",
        "endpoint",
        "error",
        "head_at",
        "head_done",
        "headers",
        "idle_epoch",
        "length",
        "lifetime",
        "names_server",
        "pooled",
        "requests",
        "reusable",
        "status",
        "target",
        "trailers",
        "worn",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        loop: asyncio.AbstractEventLoop,
        on_lost: Callable[[UpstreamConnection], None],
    ) -> None:
        self.endpoint = endpoint
        self.target = endpoint.target
        self._loop = loop
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._parser_clean = True
        self._waiter: asyncio.Future[None] | None = None
        self._drain_waiter: asyncio.Future[None] | None = None
        self._write_paused = False
        self._reading_paused = False
        self._upgrade = False
        self.busy = False
        self.closed = False
        self.pooled = False  # counted by the pool
        self.lifetime: asyncio.TimerHandle | None = None  # the pool's, if it bounds its age
        self.worn = False  # not to be kept: too old, or its endpoint or pool is gone
        self.idle_epoch = 0  # the pool's, when it became idle
        self.requests = 0  # how many it has carried
        self._reset(False)

    def _reset(self, head_request: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_done = False
        self.head_at = 0.0  # when the head was read; 0 when the whole answer came with it
        self.complete = False
        self.reusable = False
        self.answered = False  # at least one byte of an answer has arrived
        self.error: ExchangeError | None = None
        self._head_request = head_request
        self._head_taken = False
        self._head_bytes = 0
        self._interim = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self.length = -1  # declared content length; -1 unknown, -2 chunked
        self.names_server = False  # there is a Server field
        self._gather = False
        self._until_close = False
        self._saw_close = False
        self._switched = False
        self._named: tuple[bytes, ...] = ()
        self._fault = ""
        self.trailers: Sequence[Header] = ()

    # The consumer's side

    def begin(self, data: bytes, head_request: bool, upgrade: bool = False) -> None:
        """Send a request head (and any body known already) and expect one answer.

        With `upgrade` that may be 101: `detach()` then, and go on in the other protocol.
        """
        if not self._parser_clean:
            self._parser = HttpResponseParser(self)
            self._parser_clean = True
        if self.requests:
            self._reset(head_request)
        else:
            self._head_request = head_request
        self._upgrade = upgrade
        self.requests += 1
        self.busy = True
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    def wait(self) -> asyncio.Future[None]:
        """A future that ends when there is something to take, or fails with an ExchangeError.

        One consumer at a time; nothing else may await the connection meanwhile.
        """
        waiter = self._waiter = self._loop.create_future()
        if self.error is not None:
            waiter.set_exception(self.error)
        elif self.closed and not self.complete:
            self.error = self._lost_error()  # it went while it was handed over
            waiter.set_exception(self.error)
        else:
            self._wake()
        return waiter

    def take(self) -> bytes:
        """All body bytes that have arrived and were not taken; marks the head as taken."""
        self._head_taken = True
        chunks = self._chunks
        if not chunks:
            return b""
        self._chunks = []
        self._buffered = 0
        if self._reading_paused:
            self._reading_paused = False
            if self._transport is not None and not self.closed:
                self._transport.resume_reading()
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def gather_no_more(self) -> bool:
        """Deliver what is there of an answer that was to be gathered whole; False if there is none.

        For an answer that takes its time: its head is not to be held back, and the consumer sees
        each piece of the body as a sign of life.
        """
        if not (self._gather and self.head_done) or self.complete:
            return False
        self._gather = False
        self._wake()
        return True

    def write(self, data: bytes) -> None:
        """Queue request body bytes; await `drain()` when `must_drain` says so."""
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    @property
    def must_drain(self) -> bool:
        return self._write_paused and not self.closed

    async def drain(self) -> None:
        """Return when the transport takes more bytes, or when the connection is lost."""
        while self.must_drain:
            self._drain_waiter = self._loop.create_future()
            await self._drain_waiter

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """After a 101: the socket, not being read, and what was read of the other protocol.

        Raises:
            BadUpstreamResponse: the connection has not switched, or was lost.
        """
        transport = self._transport
        if transport is None or self.closed or not self._switched:
            raise BadUpstreamResponse("101 without an Upgrade")
        self._transport = None
        self.closed = True
        return transport, self.take()

    def finish(self) -> None:
        """The answer was consumed: go idle (`reusable`) without touching the socket."""
        self.busy = False
        self._waiter = None
        self._chunks = []
        if self._reading_paused:
            self._reading_paused = False
            if self._transport is not None and not self.closed:
                self._transport.resume_reading()

    def fail(self, error: ExchangeError) -> None:
        """Give the request up: the consumer gets `error`, the socket is closed at once."""
        if self.error is None:
            self.error = error
        self.reusable = False
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(self.error)
        self.close()

    def close(self) -> None:
        """Close at once; whatever was not written is dropped."""
        self.closed = True
        self.reusable = False
        transport = self._transport
        if transport is not None:
            self._transport = None
            transport.abort()
        self._release_drain()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.busy:
            # Nobody asked: an answer to nothing would be taken for the next request's.
            self.close()
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as switch:
            if not self._switch(data[switch.args[0] :]):
                self.fail(BadUpstreamResponse("the upstream switched protocols unasked"))
                return
        except HttpParserError as exc:
            if not self.complete:
                self.fail(BadUpstreamResponse(f"unreadable answer: {self._fault or exc}"))
                return
            self.reusable = False
        if not self.head_done:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.fail(BadUpstreamResponse(f"response head over {MAX_HEAD} bytes"))
            return
        if not self.complete and not self.head_at:
            self.head_at = clock.monotonic()
        self._wake()

    def eof_received(self) -> None:
        if not self.busy:
            self.closed = True  # the pool must not hand it out before connection_lost is called
        elif self.complete:
            self.reusable = False  # closed behind its answer: nobody else must get it
        elif self._until_close:
            self.complete = True
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.reusable = False
        self._transport = None
        if self.busy and not self.complete and self.error is None:
            self.fail(self._lost_error())
        self._release_drain()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._release_drain()

    # httptools callbacks, called from inside feed_data

    def on_message_begin(self) -> None:
        if self.complete:
            # A second message nobody asked for. Its bytes must not reach the next request.
            self._refuse("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self.head_done:
            self._trailer(name, value)
            return
        if name in RESPONSE_SPECIAL:
            self._special_header(name, value)
        else:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 and not (status == 101 and self._upgrade):
            self._skip_interim(status)
            return
        if status > 599:
            self._refuse(f"status {status}")
        self.status = status
        self.head_done = True
        if self._named:
            self.headers = [pair for pair in self.headers if pair[0] not in self._named]
        if self._head_request or status in NO_BODY or status == 101:
            self._complete_without_body()
        elif self.length == -1:
            self._until_close = True
        elif 0 <= self.length <= GATHER_LIMIT:
            self._gather = True

    def on_body(self, chunk: bytes) -> None:
        if self.complete:
            self.reusable = False  # a body where none is allowed
            return
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered > READ_HIGH_WATER and not self._reading_paused:
            self._reading_paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.complete:
            self._parser_clean = True
        elif self.head_done:
            self.complete = True
            self.reusable = self._parser.should_keep_alive()

    # Internals

    def _special_header(self, name: bytes, value: bytes) -> None:
        """The headers that say how the message is framed, and those for this hop only."""
        if name == b"content-length":
            if self.length != -1:
                self._refuse("ambiguous content length")
            value = value.rstrip(b" \t")  # llhttp leaves it there
            # Digits only: int() would also take a sign, underscores and spaces.
            if not value.isdigit():
                self._refuse("invalid content length")
            self.length = int(value)
        elif name == b"transfer-encoding":
            if self.length != -1 or value.strip().lower() != b"chunked":
                self._refuse("ambiguous or unsupported transfer encoding")
            self.length = -2
        elif name == b"connection":
            tokens = connection_tokens(value)
            self._saw_close = self._saw_close or b"close" in tokens
            self._named += tuple(t for t in tokens if t not in (b"close", b"keep-alive"))
        elif name == b"server":
            self.names_server = True
            self.headers.append((name, value))

    def _trailer(self, name: bytes, value: bytes) -> None:
        """A field after the body. Those that frame or route a message have no place there."""
        if name in NO_TRAILER or name in self._named:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD or len(self.trailers) >= MAX_TRAILERS:
            self._refuse("too many trailer fields")
        self.trailers = (*self.trailers, (name, value))

    def _refuse(self, fault: str) -> None:
        """Stop parsing: httptools turns the exception into an HttpParserError for feed_data."""
        self._fault = fault
        raise ValueError(fault)

    def _skip_interim(self, status: int) -> None:
        self._interim += 1
        if status == 101 or status < 100 or self._interim > MAX_INTERIM:
            self._refuse(f"unexpected interim status {status}")
        self.headers = []
        self.length = -1
        self._named = ()
        self._saw_close = False

    def _switch(self, rest: bytes) -> bool:
        """What follows is another protocol, and waits for whoever speaks it."""
        if not self._upgrade or self.status != 101 or self._transport is None:
            return False
        self._switched = True
        self.reusable = False
        self._chunks = [rest] if rest else []
        # not `_reading_paused`: taking what is there must not resume it
        self._transport.pause_reading()
        return True

    def _complete_without_body(self) -> None:
        """HEAD, 204, 304: the head is the message, whatever length it declares.

        httptools cannot be told that a HEAD was asked, so its parser may now wait for a body; it is
        replaced before the next request unless it reports the end of this message itself.
        """
        self.complete = True
        self._parser_clean = False
        keeps = not self._saw_close and self._parser.get_http_version() == "1.1"
        self.reusable = keeps and self.status != 101

    def _wake(self) -> None:
        waiter = self._waiter
        if (
            waiter is not None
            and not waiter.done()
            and (
                self.complete
                or (self.head_done and not self._gather and (self._chunks or not self._head_taken))
            )
        ):
            waiter.set_result(None)

    def _lost_error(self) -> UpstreamClosed:
        if not self.answered:
            return UpstreamClosed("the upstream closed the connection without an answer")
        return UpstreamClosed("the upstream closed the connection in the middle of its answer")

    def _release_drain(self) -> None:
        waiter = self._drain_waiter
        if waiter is not None:
            self._drain_waiter = None
            if not waiter.done():
                waiter.set_result(None)
