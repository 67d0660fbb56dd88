"""One timer for all requests in flight: response time-outs, and clients that went away.

Granian says that a client is gone only through `receive()`, and drops what is sent afterwards
without a word. A task and a timer per request to notice would cost a quarter of the whole hot path,
so nothing is armed for the requests that end within two ticks, which are nearly all. Time is
counted in ticks: a request costs two dictionary operations and reads no clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from math import ceil
from typing import Any, Final

from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import (
    ClientDisconnected,
    ProxyError,
    RequestTimeout,
    ResponseTimeout,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

TICK_S: Final = 0.05  # how late a time-out or a disconnect may be noticed
ARM_AFTER: Final = 2  # ticks a request must last before its client is watched

# A client that sends nothing of a body it announced for this long is not coming back.
CLIENT_BODY_S: Final = 60
# One that takes nothing of its answer: longer, as what is seen here is a frame of up to 256 KiB
# being taken, not each packet.
CLIENT_READ_S: Final = 300


def ticks(seconds: float) -> int:
    """Ticks that last at least `seconds`, wherever in a tick they start."""
    return ceil(seconds / TICK_S) + 1


_BODY_TICKS: Final = ticks(CLIENT_BODY_S)
_READ_TICKS: Final = ticks(CLIENT_READ_S)


class Exchange:
    """One request in flight, as the watch sees it: whom it waits for, and how to end it."""

    __slots__ = (
        "_late",
        "_response_ticks",
        "_watch",
        "blocked",
        "body_sent",
        "bytes_in",
        "conn",
        "deadline",
        "error",
        "receive",
        "receiving",
        "started",
        "watcher",
    )

    def __init__(self, watch: Watch, receive: Receive, response_ticks: int) -> None:
        self._watch = watch
        self._response_ticks = response_ticks
        self._late: type[ProxyError] = ResponseTimeout
        self.receive = receive
        self.started = watch.tick
        self.deadline = 0  # in ticks; 0 is none
        self.conn: UpstreamConnection | None = None
        self.error: ProxyError | None = None
        self.receiving = False  # `receive` is in use: it must not be called a second time
        self.body_sent = True
        self.bytes_in = 0
        self.watcher: asyncio.Task[None] | None = None
        # The relay's task while it awaits the client and not the connection.
        self.blocked: asyncio.Task[Any] | None = None

    def await_upstream(self) -> None:
        """The upstream has `response_timeout` from now to show a sign of life."""
        if self.body_sent:
            self.deadline = self._watch.tick + self._response_ticks
            self._late = ResponseTimeout

    def await_client_body(self) -> None:
        self.deadline = self._watch.tick + _BODY_TICKS
        self._late = RequestTimeout

    def await_client_read(self) -> None:
        self.deadline = self._watch.tick + _READ_TICKS
        self._late = ClientDisconnected

    def await_upload(self) -> None:
        """The upstream does not take the body it is sent."""
        self.deadline = self._watch.tick + self._response_ticks
        self._late = ResponseTimeout

    def abort(self, error: ProxyError) -> None:
        """End the exchange: whatever the relay awaits fails with `error`."""
        if self.error is not None:
            return
        self.error = error
        self.deadline = 0
        if self.conn is not None:
            self.conn.fail(error)
        if self.blocked is not None:
            self.blocked.cancel()

    def expire(self) -> None:
        self.abort(self._late(_LATE[self._late]))

    async def follow_client(self) -> None:
        """Call `receive()` until it says that the client is gone (or was fully answered)."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.abort(ClientDisconnected("the client closed the connection"))


_LATE: Final[dict[type[ProxyError], str]] = {
    ResponseTimeout: "the upstream did not answer in time",
    RequestTimeout: "the request body stopped arriving",
    ClientDisconnected: "the client stopped reading",
}


class Watch:
    """The exchanges of one event loop, oldest first. The timer runs only while there are some."""

    __slots__ = ("_exchanges", "_timer", "loop", "tick")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tick = 0
        self._exchanges: dict[Exchange, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self, receive: Receive, response_ticks: int) -> Exchange:
        """A watched exchange; `close()` it in any case."""
        if self._timer is None:
            self._schedule()
        exchange = Exchange(self, receive, response_ticks)
        self._exchanges[exchange] = None
        return exchange

    def close(self, exchange: Exchange) -> None:
        del self._exchanges[exchange]
        if exchange.watcher is not None:
            exchange.watcher.cancel()
            exchange.watcher = None

    def __len__(self) -> int:
        return len(self._exchanges)

    def _schedule(self) -> None:
        self.tick = int(self.loop.time() / TICK_S)
        self._timer = self.loop.call_later(TICK_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        if not self._exchanges:
            return
        self._schedule()
        tick = self.tick
        for exchange in tuple(self._exchanges):
            if exchange.started > tick - ARM_AFTER:
                break  # all that follow are younger
            if exchange.conn is not None and exchange.conn.gather_no_more():
                continue
            if exchange.deadline and tick >= exchange.deadline:
                exchange.expire()
            elif exchange.watcher is None and not exchange.receiving and exchange.error is None:
                exchange.watcher = self.loop.create_task(exchange.follow_client())


_watch: Watch | None = None


def current() -> Watch:
    """The running loop's watch."""
    global _watch
    loop = asyncio.get_running_loop()
    if _watch is None or _watch.loop is not loop:
        _watch = Watch(loop)
    return _watch
