"""One end of a tunnel, and what it sends to the other.

Where nothing is counted, what arrives is passed on in the same call. Where something is, it waits
until it was counted: one question for all that has arrived since the last one, so a busy connection
asks no more often than answers come. When the answer is no, what still fits is found by halves, and
not one message more is passed on.

Memory: an end is not read while more than `HIGH_WATER` bytes of it wait to be counted, or while the
other end does not take what it is sent. One read (256,000 bytes with uvloop) comes on top of each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from core.telemetry import logs
from gateway.http.exchange import Tunnel as Taken
from gateway.proxy.websocket.frames import Cut, FrameReader, close_frame, cuts

if TYPE_CHECKING:
    from gateway.proxy.websocket.tunnel import Tunnel

HIGH_WATER: Final = 64 * 1024

_log = logs.get_logger()


class Refusal(NamedTuple):
    """Why nothing more is passed on: what to close with."""

    code: int
    reason: str


# Counts messages and bytes of payload before they are passed on; None when they may be.
Admit = Callable[[int, int], Awaitable[Refusal | None]]


class Side(Taken):
    """Attributes:
    name: "client" or "upstream".
    messages, payload: of this end, as far as they were passed on.
    left: bytes of the data frame that was passed on last that are still to come.
    told: a close was sent to this end.
    gone: it sends nothing any more; `transport` is None once it takes nothing any more either.
    """

    __slots__ = (
        "_admit",
        "_masks",
        "_pending",
        "_pump",
        "_read_paused",
        "_waiting",
        "_write_paused",
        "gone",
        "left",
        "messages",
        "name",
        "other",
        "payload",
        "reader",
        "told",
        "transport",
        "tunnel",
    )

    other: Side
    tunnel: Tunnel

    def __init__(self, name: str, reader: FrameReader, admit: Admit | None) -> None:
        self.name = name
        self.reader = reader
        self.on_closed = None
        self.task = None
        self.transport: asyncio.Transport | None = None
        self.messages = 0
        self.payload = 0
        self.left = 0
        self.told = False
        self.gone = False
        self._admit = admit
        self._masks = name == "upstream"  # we are its client
        self._pending: list[tuple[bytes, int, int]] = []
        self._waiting = 0  # bytes that are not passed on yet
        self._pump: asyncio.Task[None] | None = None
        self._read_paused = False
        self._write_paused = False

    @property
    def closed(self) -> bool:
        """This end has sent a close."""
        return self.reader.close is not None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        tunnel = self.tunnel
        tunnel.idle = 0
        data, messages, payload = self.reader.feed(data)
        if tunnel.ending:
            if self.closed:
                self.finish()  # that was the answer to our close
            return
        if not data:
            pass
        elif self._admit is None:
            self.left = self.reader.left
            self._pass(data, messages, payload)
            if tunnel.leaving:
                tunnel.leave()
        else:
            self._pending.append((data, messages, payload))
            self._waiting += len(data)
            if self._pump is None:
                self._pump = asyncio.get_running_loop().create_task(self._count())
            self._steer()
        if self._pump is None:
            self._all_passed()

    def eof_received(self) -> bool:
        self._went()
        # We close, when what it sent has been passed on; over TLS there is no half of a connection.
        transport = self.transport
        return transport is not None and transport.get_extra_info("ssl_object") is None

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.on_closed is not None:
            self.on_closed()
        self._went()
        self.other._steer()
        self.tunnel.lost()

    def pause_writing(self) -> None:
        self._write_paused = True
        self.other._steer()

    def resume_writing(self) -> None:
        self._write_paused = False
        self.other._steer()

    # The server's view

    def going_away(self) -> None:
        self.tunnel.go_away()

    # The tunnel's view

    def attach(self, transport: asyncio.Transport) -> None:
        """Go on with a connection that is not being read yet: `start` begins to."""
        transport.set_protocol(self)
        self.connection_made(transport)

    def start(self, data: bytes) -> None:
        """Begin to read; `data` was read already."""
        if data:
            self.data_received(data)
        transport = self.transport
        if not self._read_paused and transport is not None and not transport.is_closing():
            transport.resume_reading()

    def part(self, code: int, reason: str) -> None:
        """Stop passing on what this end sends, and take leave of it.

        With code 0, or where a frame is under way that another cannot be put into, the connection
        alone is closed.
        """
        self._pending.clear()
        self._waiting = 0
        if self.transport is None:
            return
        if code and not self.told and not self.gone and not self.other.left:
            self.told = True
            self.transport.write(close_frame(code, reason, masked=self._masks))
        if not self.told or self.gone or self.closed:
            self.finish()
        else:
            self._steer()  # to read its answer

    def finish(self) -> None:
        """Close the connection, when what was written to it has been sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # Passing on

    def _went(self) -> None:
        if self.gone:
            return
        self.gone = True
        if self.tunnel.ending:
            self.finish()
        elif self._pump is None:
            self._all_passed()

    def _all_passed(self) -> None:
        """What follows when all that has arrived was passed on."""
        reader = self.reader
        if self.tunnel.ending:
            return
        if reader.close is not None and not self.other.told:
            self.other.told = True
            self.tunnel.closing(self, *reader.close)
        if reader.error is not None:
            self.tunnel.fault(self, reader.error)
        elif self.gone:
            self.tunnel.gone(self)

    def _pass(self, data: bytes, messages: int, payload: int) -> None:
        self.messages += messages
        self.payload += payload
        self.tunnel.passed(self, messages, payload)
        transport = self.other.transport
        if transport is not None:
            transport.write(data)

    def _steer(self) -> None:
        """Read this end, or leave what it sends in its socket."""
        transport = self.transport
        pause = not self.tunnel.ending and (
            self._waiting > HIGH_WATER
            or (self.other._write_paused and self.other.transport is not None)
        )
        if pause is self._read_paused or transport is None or transport.is_closing():
            return
        self._read_paused = pause
        if pause:
            transport.pause_reading()
        else:
            transport.resume_reading()

    async def _count(self) -> None:
        """Count what waits, and pass it on, until nothing waits."""
        try:
            while self._pending and not self.tunnel.ending:
                pending, self._pending = self._pending, []
                data = b"".join([piece[0] for piece in pending])
                left = self.reader.left
                whole = Cut(len(data), sum(p[1] for p in pending), sum(p[2] for p in pending))
                refusal = await self._admit_some(data, whole, left)
                if refusal is not None:
                    self.tunnel.shut(*refusal, who="gateway")
                    return
                self._waiting -= len(data)
                self._steer()
                if self.tunnel.leaving:
                    self.tunnel.leave()
        except Exception:
            _log.exception("websocket_failed")
            self.tunnel.shut(1011, "internal error", who="gateway")
        finally:
            self._pump = None
        self._all_passed()

    async def _admit_some(self, data: bytes, whole: Cut, left: int) -> Refusal | None:
        """Pass on as much of `data` as is admitted, message by message; why the rest is not.

        `left` is what is to come of the data frame that `data` ends in.
        """
        assert self._admit is not None
        refusal = await self._admit(whole.messages, whole.payload)
        if self.tunnel.ending:
            return None
        if refusal is None:
            self.left = left
            self._pass(data, whole.messages, whole.payload)
            return None
        parts = cuts(data, self.left)
        before, done, size = Cut(0, 0, 0), 0, len(parts)
        while size > 1 or refusal is None:
            if refusal is not None:
                size //= 2
            size = min(size, len(parts) - done)
            if not size:
                return None
            cut = parts[done + size - 1]
            messages, payload = cut.messages - before.messages, cut.payload - before.payload
            refusal = await self._admit(messages, payload)
            if self.tunnel.ending:
                return None
            if refusal is None:
                self.left = left if cut.at == len(data) else 0
                self._pass(data[before.at : cut.at], messages, payload)
                before, done = cut, done + size
        return refusal
