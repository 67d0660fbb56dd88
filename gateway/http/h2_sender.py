"""What a connection of HTTP/2 has to say, in the order and at the pace that its client takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from h2.connection import H2Connection
from h2.exceptions import ProtocolError

from gateway.http.h2_exchange import Http2Exchange
from gateway.http.h2_guard import Guard

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

MAX_FRAME: Final = 16_384
# Of all answers of a connection, what is handed to its socket in one go.
_BURST: Final = 256 * 1024
# Above this much unsent the client is not read: it has to take what it asked for first.
_UNSENT_MAX: Final = 512 * 1024


class Sender:
    """Sends the bodies that wait for room, a frame of each in turn, and whatever the library says.

    `on_sent(exchange)` is called when all of an answer was sent, `on_lost(exchange)` when its
    stream turns out to be closed.
    """

    __slots__ = (
        "_blocked",
        "_flushing",
        "_guard",
        "_library",
        "_on_lost",
        "_on_sent",
        "_paused",
        "_server",
        "_stopped_reading",
        "transport",
    )

    def __init__(
        self,
        server: HttpServer,
        library: H2Connection,
        guard: Guard,
        on_sent: Callable[[Http2Exchange], object],
        on_lost: Callable[[Http2Exchange], object],
    ) -> None:
        self._server = server
        self._library = library
        self._guard = guard
        self._on_sent = on_sent
        self._on_lost = on_lost
        self._blocked: dict[int, Http2Exchange] = {}  # those with something still to be sent
        self._flushing = False
        self._paused = False
        self._stopped_reading = False
        self.transport: asyncio.Transport | None = None

    def add(self, exchange: Http2Exchange) -> None:
        """There is something to send of it, or its end."""
        self._blocked[exchange.stream] = exchange
        self.later()

    def drop(self, stream: int) -> None:
        self._blocked.pop(stream, None)

    def stop(self) -> None:
        """Send no more; the client is read again."""
        self._blocked.clear()
        self._stop_reading(False)
        self.transport = None

    def pause(self) -> None:
        """The socket takes no more."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._stop_reading(False)
        self.later()

    def later(self) -> None:
        """What several streams have to say in this turn of the loop goes in one write."""
        if not self._flushing and self.transport is not None:
            self._flushing = True
            self._server.loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        self.flush()

    def flush(self) -> None:
        """Send what can be sent: heads and controls, and of bodies what the client has room for."""
        transport = self.transport
        if transport is None:
            return
        sent = 0
        while self._blocked and not self._paused and sent < _BURST:
            count = sum([self._send_some(exchange) for exchange in tuple(self._blocked.values())])
            if not count:
                break
            sent += count
        data = self._library.data_to_send()
        if data:
            transport.write(data)
        if sent >= _BURST and self._blocked and not self._paused:
            self.later()
        if self._paused and transport.get_write_buffer_size() > _UNSENT_MAX:
            self._stop_reading(True)

    def _send_some(self, exchange: Http2Exchange) -> int:
        """One frame of a stream at most; returns the bytes, of an end at least 1."""
        stream, library = exchange.stream, self._library
        try:
            if not exchange.unsent:
                if not exchange.ended:
                    del self._blocked[stream]
                    return 0
                if exchange.trailers_out:
                    library.send_headers(stream, exchange.trailers_out, end_stream=True)
                else:
                    library.end_stream(stream)
                self._on_sent(exchange)
                return 1
            room = min(library.local_flow_control_window(stream), MAX_FRAME)
            if room <= 0:
                return 0
            piece = exchange.take(min(room, library.max_outbound_frame_size))
            cut = len(piece) == room and room < MAX_FRAME and exchange.unsent > 0
            last = exchange.ended and not exchange.unsent and not exchange.trailers_out
            library.send_data(stream, piece, end_stream=last)
        except ProtocolError:
            self._on_lost(exchange)
            return 0
        exchange.moved = self._server.tick
        self._guard.sent(len(piece), cut)
        if last:
            self._on_sent(exchange)
        return len(piece)

    def _stop_reading(self, stop: bool) -> None:
        if stop is self._stopped_reading or self.transport is None:
            return
        self._stopped_reading = stop
        if stop:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()
