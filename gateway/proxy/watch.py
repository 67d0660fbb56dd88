"""One timer for all requests in flight: their time-outs.

A timer per request would cost more than the rest of its waiting. Nothing is armed for the requests
that end within two ticks, which are nearly all. Time is counted in ticks: a request costs two
dictionary operations and reads no clock.
"""

from __future__ import annotations

import asyncio
from math import ceil
from typing import Any, Final, NamedTuple

from mypy_extensions import mypyc_attr

from gateway.http.errors import ClientDisconnected, ExchangeError, RequestTimeout
from gateway.http.exchange import Exchange
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import IdleTimeout, ResponseTimeout, TotalTimeout

TICK_S: Final = 0.05  # how late a time-out may be noticed
ARM_AFTER: Final = 2  # ticks a request must last before it is looked at

# A client that sends nothing of a body it announced for this long is not coming back; configurable.
CLIENT_BODY_S: Final = 60
# One that takes nothing of its answer: longer, as what is seen here is a buffer being emptied, not
# each packet.
CLIENT_READ_S: Final = 300


def ticks(seconds: float) -> int:
    """Ticks that last at least `seconds`, wherever in a tick they start."""
    return ceil(seconds / TICK_S) + 1


_READ_TICKS: Final = ticks(CLIENT_READ_S)


class Limits(NamedTuple):
    """Time-outs of an upstream, in ticks; `total` is 0 where there is none."""

    response: int
    idle: int
    total: int


class _TryTimeout(ResponseTimeout):
    """Of one try: the relay goes on."""


@mypyc_attr(allow_interpreted_subclasses=True)  # compiled: see gateway/compiled.py
class Flight:
    """One relayed request, as the watch sees it: whom it waits for, and how to end it."""

    __slots__ = (
        "_late",
        "_limits",
        "_watch",
        "blocked",
        "body_sent",
        "bytes_in",
        "conn",
        "deadline",
        "error",
        "exchange",
        "started",
    )

    def __init__(self, watch: Watch, exchange: Exchange, limits: Limits) -> None:
        self._watch = watch
        self._limits = limits
        self._late: type[ExchangeError] = ResponseTimeout
        self.exchange = exchange
        self.started = 0
        self.deadline = 0  # in ticks; 0 is none
        self.conn: UpstreamConnection | None = None
        self.error: ExchangeError | None = None
        self.body_sent = True
        self.bytes_in = 0
        # The relay's task while it awaits the client and not the connection.
        self.blocked: asyncio.Task[Any] | None = None
        exchange.on_gone = self.client_gone

    def await_upstream(self) -> None:
        """The upstream has its response time-out from now to begin its answer."""
        if self.body_sent:
            self.deadline = self._watch.tick + self._limits.response
            self._late = ResponseTimeout

    def await_try(self, per_try_ticks: int) -> None:
        """The same for a try that may be followed by another."""
        self.deadline = self._watch.tick + per_try_ticks
        self._late = _TryTimeout

    def await_more(self) -> None:
        """The upstream has its idle time-out from now for the next piece of its answer."""
        if self.body_sent:
            self.deadline = self._watch.tick + self._limits.idle
            self._late = IdleTimeout

    def await_client_body(self) -> None:
        self.deadline = self._watch.tick + self._watch.body_ticks
        self._late = RequestTimeout

    def await_client_read(self) -> None:
        self.deadline = self._watch.tick + _READ_TICKS
        self._late = ClientDisconnected

    def await_upload(self) -> None:
        """The upstream does not take the body it is sent."""
        self.deadline = self._watch.tick + self._limits.response
        self._late = ResponseTimeout

    def abort(self, error: ExchangeError) -> None:
        """End the relay: whatever it awaits fails with `error`."""
        if self.error is not None:
            return
        self.error = error
        self.deadline = 0
        if self.conn is not None:
            self.conn.fail(error)
        if self.blocked is not None:
            self.blocked.cancel()

    def expire(self) -> None:
        if self._late is _TryTimeout and self.conn is not None:
            self.deadline = 0
            self.conn.fail(ResponseTimeout(_LATE[ResponseTimeout]))
        else:
            self.abort(self._late(_LATE[self._late]))

    def overdue(self, tick: int) -> bool:
        """Whether the total time-out has passed."""
        return 0 < self._limits.total <= tick - self.started

    def expire_total(self) -> None:
        self.abort(TotalTimeout("the request took longer than it may in total"))

    def client_gone(self) -> None:
        self.abort(ClientDisconnected("the client closed the connection"))


_LATE: Final[dict[type[ExchangeError], str]] = {
    ResponseTimeout: "the upstream did not answer in time",
    IdleTimeout: "the upstream stopped in the middle of its answer",
    _TryTimeout: "the upstream did not answer in time",
    RequestTimeout: "the request body stopped arriving",
    ClientDisconnected: "the client stopped reading",
}


class Watch:
    """The flights of one event loop, oldest first. The timer runs only while there are some."""

    __slots__ = ("_flights", "_timer", "body_ticks", "loop", "tick")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tick = 0
        self.body_ticks = ticks(CLIENT_BODY_S)
        self._flights: dict[Flight, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, flight: Flight) -> None:
        """Watch a flight from now on; `close()` it in any case."""
        if self._timer is None:
            self._schedule()
        flight.started = self.tick
        self._flights[flight] = None

    def close(self, flight: Flight) -> None:
        del self._flights[flight]
        flight.exchange.on_gone = None

    def __len__(self) -> int:
        return len(self._flights)

    def _schedule(self) -> None:
        self.tick = int(self.loop.time() / TICK_S)
        self._timer = self.loop.call_later(TICK_S, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        if not self._flights:
            return
        self._schedule()
        tick = self.tick
        for flight in tuple(self._flights):
            if flight.started > tick - ARM_AFTER:
                break  # all that follow are younger
            if flight.overdue(tick):
                flight.expire_total()
                continue
            if flight.conn is not None and flight.conn.gather_no_more():
                continue
            if flight.deadline and tick >= flight.deadline:
                flight.expire()


_watch: Watch | None = None


def current() -> Watch:
    """The running loop's watch."""
    global _watch
    loop = asyncio.get_running_loop()
    if _watch is None or _watch.loop is not loop:
        _watch = Watch(loop)
    return _watch
