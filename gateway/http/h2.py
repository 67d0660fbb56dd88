"""HTTP/2 connections of clients: frames and states by the library h2, everything else here.

Frames are handed to the library one at a time, so that a flood is noticed at its frame, a client
that is leaving does not take its open streams with it, and no read costs more than one frame at
once. Flow control is honoured both ways: a body is taken from the network as it is read, an answer
is sent as its client makes room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset, TrailersReceived
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hyperframe.frame import GoAwayFrame

from gateway.http import h2_guard as guard
from gateway.http.base import LINGER_S, Connection, descriptor, still_sends
from gateway.http.body import Body
from gateway.http.errors import BadRequest
from gateway.http.h2_exchange import Http2Exchange
from gateway.http.h2_request import Refused, read_head, read_trailers
from gateway.http.h2_sender import MAX_FRAME, Sender
from gateway.http.message import Header

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEAD: Final = 9
# As in h1: how long, and how much of, a closed connection is read, so that GOAWAY arrives.
_LINGER_BYTES: Final = 1024 * 1024
# RFC 7541's default for the table of header fields; a client may allow gigabytes.
_TABLE: Final = 4_096
_EVERY_STREAM: Final = 2**31 - 1

_CONFIG: Final = H2Configuration(
    client_side=False,
    header_encoding=None,
    # Both are done here: what the library refuses ends the connection, not just the stream.
    validate_inbound_headers=False,
    normalize_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
)

_GRPC: Final[tuple[Header, ...]] = (
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-status", b"12"),
    (b"grpc-message", b"this gateway does not proxy gRPC"),
)


class _Encoder(Encoder):
    """Remembers no more of what it sent than it is obliged to, however much a client allows."""

    @property
    def header_table_size(self) -> int:
        return int(self.header_table.maxsize)

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        cast(Any, Encoder.header_table_size).fset(self, min(value, _TABLE))


class _Library(H2Connection):
    # It remembers how streams ended; 65,536 of them would be megabytes a connection.
    MAX_CLOSED_STREAMS = 1_024

    def __init__(self) -> None:
        super().__init__(_CONFIG)
        self.encoder = _Encoder()


class Http2Connection(Connection):
    """One connection; its streams are `Http2Exchange`s."""

    __slots__ = (
        "_block_bytes",
        "_client_leaving",
        "_greeted",
        "_guard",
        "_h2",
        "_held",
        "_idle_since",
        "_in_block",
        "_lingering",
        "_partial_since",
        "_preface",
        "_sender",
        "_server",
        "_streams",
        "_tasks",
        "_transport",
        "peer",
        "scheme",
    )

    def __init__(self, server: HttpServer, scheme: str) -> None:
        self._server = server
        self.scheme = scheme
        self.peer = ""
        self.deadline = 0
        self.unsent = 0
        self._transport: asyncio.Transport | None = None
        self._h2 = _Library()
        self._guard = guard.Guard(server.tick)
        self._sender = Sender(server, self._h2, self._guard, self.finished, self._lost)
        self._streams: dict[int, Http2Exchange] = {}
        # Of all handlers that run, also of streams that are closed already.
        self._tasks: set[asyncio.Task[None]] = set()
        self._held = b""
        self._preface = _PREFACE
        self._greeted = False  # the client's settings have come
        self._in_block = False
        self._block_bytes = 0
        self._idle_since = server.tick
        self._partial_since = server.tick  # since when a rest is waited for; 0 when none is
        self._client_leaving = False
        self._lingering = -1  # bytes still to be read for nothing; -1 when not closing

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._sender.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        limits, library = self._server.limits, self._h2
        library.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window,
                SettingCodes.MAX_HEADER_LIST_SIZE: limits.head,
            },
        )
        # Up to twice of what is allowed is decoded, so that the answer can be 431.
        library.decoder.max_header_list_size = limits.head * 2
        library.initiate_connection()
        # Apart, so that the library enforces it only once the client has acknowledged it.
        library.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: limits.streams})
        more = limits.connection_window - library.inbound_flow_control_window
        if more > 0:
            library.increment_flow_control_window(more)
        self.deadline = self._server.tick + limits.head_s
        self._server.opened(self)
        self._sender.flush()
        if self._server.draining:
            self.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._transport = None
        self._held = b""
        self._sender.transport = None
        self._lose_all()

    def pause_writing(self) -> None:
        self._sender.pause()

    def resume_writing(self) -> None:
        self._sender.resume()

    def data_received(self, data: bytes) -> None:
        if self._lingering >= 0:
            self._lingering -= len(data)
            if self._lingering < 0 and self._transport is not None:
                self._transport.abort()
            return
        if self._held:
            data = self._held + data
        try:
            self._held = data[self._frames(data) :]
        except guard.Overspent as overspent:
            self._server.event(str(overspent))
            self._shut(ErrorCodes.ENHANCE_YOUR_CALM)
            return
        except ProtocolError:
            self._server.event("h2_protocol")
            self._shut(None)  # the library has queued its GOAWAY
            return
        if self._client_leaving and self.idle:
            self.close()
            return
        self._arm()
        self._sender.flush()

    # Frames

    def _frames(self, data: bytes) -> int:
        """Read all whole frames; returns how many bytes they are."""
        at = 0
        if self._preface:
            at = min(len(data), len(self._preface))
            self._h2.receive_data(data[:at])
            self._preface = self._preface[at:]
        while len(data) - at >= _FRAME_HEAD:
            length = int.from_bytes(data[at : at + 3], "big")
            kind, flags = data[at + 3], data[at + 4]
            if length > MAX_FRAME:
                self._h2.close_connection(ErrorCodes.FRAME_SIZE_ERROR)
                raise ProtocolError("a frame is too large")
            end = at + _FRAME_HEAD + length
            if end > len(data):
                break
            if not self._greeted:
                if kind != guard.SETTINGS:
                    self._h2.close_connection(ErrorCodes.PROTOCOL_ERROR)
                    raise ProtocolError("settings come first")
                self._greeted = True
            self._guard.frame(kind, flags, length, self._server.tick)
            if kind == guard.GOAWAY:
                # The library would let nothing more be sent, not even what was asked for.
                self._client_leaving = True
            else:
                self._frame(kind, flags, length, data[at:end])
            at = end
            if self._lingering >= 0 or self._transport is None:
                return len(data)
        return at

    def _frame(self, kind: int, flags: int, length: int, frame: bytes) -> None:
        if kind in (guard.HEADERS, guard.CONTINUATION):
            self._block_bytes = length + (self._block_bytes if kind != guard.HEADERS else 0)
            self._in_block = not flags & guard.END_HEADERS
            if self._block_bytes > 2 * self._server.limits.head:
                raise guard.Overspent("h2_headers")
        for event in self._h2.receive_data(frame):
            if isinstance(event, DataReceived):
                self._data(event)
            elif isinstance(event, RequestReceived):
                self._request(event)
            elif isinstance(event, StreamEnded):
                exchange = self._streams.get(event.stream_id)
                if exchange is not None and exchange.body is not None:
                    exchange.body.finish()
            elif isinstance(event, StreamReset):
                self._reset(event)
            elif isinstance(event, TrailersReceived):
                self._trailers(event)

    def _request(self, event: RequestReceived) -> None:
        stream = event.stream_id
        limits = self._server.limits
        if len(self._tasks) >= limits.streams:
            # Nothing was done with it: the client may send it again, elsewhere or later.
            self._guard.reset(self._server.tick)
            self.reset(stream, ErrorCodes.REFUSED_STREAM)
            return
        ended = event.stream_ended is not None
        block = cast(Iterable[Header], event.headers)
        try:
            head = read_head(block, ended=ended, limits=limits, scheme=self.scheme, peer=self.peer)
        except Refused as refused:
            self._refuse(stream, refused, ended, _is_head(block))
            return
        if head.grpc:
            self._server.event("grpc")
            self._h2.send_headers(stream, _GRPC, end_stream=True)
            if not ended:
                self.reset(stream, ErrorCodes.NO_ERROR)
            return
        exchange = Http2Exchange(head.request, self, stream)
        exchange.expects = head.expects
        if not ended:
            exchange.body = Body(_no_flow)  # flow control is by stream here
        self._streams[stream] = exchange
        self._server.begin(exchange)
        assert exchange.task is not None
        self._tasks.add(exchange.task)
        exchange.task.add_done_callback(self._handled)

    def _refuse(self, stream: int, refused: Refused, ended: bool, is_head: bool) -> None:
        headers, body = self._server.refuse(refused.status, refused.code, refused.detail)
        if is_head:
            body = b""
        # As much as any client has room for, and more than any problem has.
        body = body[: max(0, min(self._h2.local_flow_control_window(stream), MAX_FRAME))]
        head = [(b":status", b"%d" % refused.status), *headers, self._server.date_field]
        self._h2.send_headers(stream, head, end_stream=not body)
        if body:
            self._h2.send_data(stream, body, end_stream=True)
        if not ended:
            self.reset(stream, ErrorCodes.NO_ERROR)

    def _data(self, event: DataReceived) -> None:
        exchange = self._streams.get(event.stream_id)
        data = event.data or b""
        taken = event.flow_controlled_length
        if not data and taken:
            self._guard.control(self._server.tick)
        if exchange is not None and exchange.body is not None and not exchange.ended:
            taken -= len(data)  # the rest is padding
            if data:
                exchange.body.feed(data)
        if taken:
            self.acknowledge(event.stream_id, taken)

    def _trailers(self, event: TrailersReceived) -> None:
        exchange = self._streams.get(event.stream_id)
        if exchange is None or exchange.body is None:
            return
        try:
            block = cast(Iterable[Header], event.headers)
            exchange.body.trailers = read_trailers(block, self._server.limits)
        except Refused as refused:
            exchange.body.fail(BadRequest(refused.detail))

    def _reset(self, event: StreamReset) -> None:
        exchange = self._streams.get(event.stream_id)
        if exchange is not None:
            self._guard.reset(self._server.tick)
            self._drop(exchange)
            exchange.lose()

    # For exchanges

    def send_head(self, stream: int, headers: Sequence[Header], last: bool = False) -> None:
        with suppress(ProtocolError):  # the stream or the connection is closed
            self._h2.send_headers(stream, headers, end_stream=last)
        self._sender.later()

    def send_body(self, exchange: Http2Exchange) -> None:
        """There is something to send of it, or its end."""
        self._sender.add(exchange)

    def acknowledge(self, stream: int, size: int) -> None:
        """So much of what was received is in memory no more."""
        with suppress(ProtocolError):
            self._h2.acknowledge_received_data(size, stream)
            self._sender.later()

    def cancel(self, exchange: Http2Exchange) -> None:
        """Its answer was given up."""
        self._drop(exchange)
        self.reset(exchange.stream, ErrorCodes.INTERNAL_ERROR)

    def reset(self, stream: int, code: ErrorCodes) -> None:
        with suppress(ProtocolError):
            self._h2.reset_stream(stream, code)
        self._sender.later()

    @property
    def server(self) -> HttpServer:
        return self._server

    # For the sender

    def finished(self, exchange: Http2Exchange) -> None:
        """All of the answer is on its way."""
        self._drop(exchange)
        if not exchange.body_complete:
            self.reset(exchange.stream, ErrorCodes.NO_ERROR)  # section 8.1: stop sending

    def _lost(self, exchange: Http2Exchange) -> None:
        self._drop(exchange)
        exchange.lose()

    def _drop(self, exchange: Http2Exchange) -> None:
        self._streams.pop(exchange.stream, None)
        self._sender.drop(exchange.stream)
        body = exchange.body
        if body is not None and body.unread:
            unread = body.unread
            body.discard()
            self.acknowledge(exchange.stream, unread)
        if not self._streams:
            self._idle_since = self._server.tick
            self._arm()

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._client_leaving and self.idle:
            self.close()

    # Life cycle

    @property
    def idle(self) -> bool:
        return not self._streams and not self._in_block and not self._tasks

    @property
    def tasks(self) -> Iterable[asyncio.Task[None]]:
        return tuple(self._tasks)

    def fileno(self) -> int:
        return descriptor(self._transport)

    def leave(self) -> None:
        """What is on its way here is still served; see RFC 9113 section 6.8."""
        if self._transport is not None and self._lingering < 0:
            self._sender.flush()
            self._transport.write(_goaway(_EVERY_STREAM))

    def close(self) -> None:
        self._shut(ErrorCodes.NO_ERROR)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _shut(self, code: ErrorCodes | None) -> None:
        transport = self._transport
        if transport is None or self._lingering >= 0:
            return
        if code is not None:
            with suppress(ProtocolError):
                self._h2.close_connection(code)
        transport.write(self._h2.data_to_send())
        self._held = b""
        self._lingering = _LINGER_BYTES
        self.deadline = self._server.tick + LINGER_S + 1
        self._sender.stop()
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()
        self._lose_all()

    def _lose_all(self) -> None:
        streams, self._streams = self._streams, {}
        for exchange in streams.values():
            exchange.lose()

    def _arm(self) -> None:
        """What is waited for, and how long: the rest of a block or frame, a request, or a client
        that takes its answer.
        """
        if self._lingering >= 0:
            return
        limits, tick = self._server.limits, self._server.tick
        if self._in_block or not self._greeted or (self._held and not self._streams):
            self._partial_since = self._partial_since or tick
            self.deadline = self._partial_since + limits.head_s
        else:
            self._partial_since = 0
            self.deadline = (tick if self._streams else self._idle_since) + limits.keepalive_s

    def expire(self) -> None:
        transport = self._transport
        if transport is None:
            return
        self.deadline = 0
        if self._lingering >= 0:
            idle_s = self._server.limits.keepalive_s
            if still_sends(self, transport, self._server.tick, idle_s):
                return
            transport.abort()
        elif self._in_block or not self._streams:
            self._shut(ErrorCodes.NO_ERROR)
        else:
            # Handlers watch over their own clients; what they have left behind is watched here.
            late = self._server.tick - self._server.limits.keepalive_s
            for exchange in tuple(self._streams.values()):
                if exchange.ended and exchange.moved <= late:
                    self._drop(exchange)
                    self.reset(exchange.stream, ErrorCodes.CANCEL)
            self._arm()


def _no_flow(_: bool) -> None:
    """A body tells its socket to pause; a stream has its window instead."""


def _is_head(block: Iterable[Header]) -> bool:
    return any(name == b":method" and value == b"HEAD" for name, value in block)


def _goaway(last: int) -> bytes:
    # Not by the library: it would let nothing be sent after it.
    frame = GoAwayFrame(0, last_stream_id=last)
    return bytes(frame.serialize())
