"""A WebSocket through the gateway: both ends, and how they part.

Whoever ends it, the other is told, and the reason is kept for whoever asks later:

  an end closes        its close is passed on, and the other's answer; then both connections end
  an end vanishes      the client: the upstream's connection is closed, as the client's was
                       the upstream: the client is sent 1014
  an end breaks rules  it is sent 1002, 1007 or 1009; the upstream 1001, or the client 1014
  the gateway ends it  both are sent the code: 1008 a limit, 1001 idle or draining, 1013 no decision

A close can only be put between frames. Where a data frame is under way towards an end, that end's
connection is closed without one (it sees 1006); when the gateway drains, it first waits for the end
of the frame for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.proxy.websocket import watch
from gateway.proxy.websocket.frames import ABNORMAL, BAD_GATEWAY, GOING_AWAY, FrameError
from gateway.proxy.websocket.side import Side

# How long an end may take to answer a close, in seconds; how long one that broke the protocol has
# to read that it did; and how long a drain waits for frames.
CLOSE_S: Final = 5
FAULT_S: Final = 1
LEAVE_S: Final = 3

CLIENT: Final = "client"
UPSTREAM: Final = "upstream"
GATEWAY: Final = "gateway"


class Tunnel:
    """Attributes:
    closed: done when both connections are closed.
    code, reason, who: why it ended; code 0 while it has not. 1006 is a connection lost without a
        close, 1005 a close without a code.
    idle: seconds since anything has arrived.
    ending: both ends were told; nothing is passed on any more.
    leaving: it is to end as soon as no frame is under way.
    """

    __slots__ = (
        "_on_passed",
        "client",
        "closed",
        "code",
        "deadline",
        "ending",
        "idle",
        "idle_s",
        "leaving",
        "reason",
        "upstream",
        "who",
    )

    def __init__(
        self,
        client: Side,
        upstream: Side,
        *,
        idle_ms: int,
        on_passed: Callable[[bool, int, int], object],
    ) -> None:
        """`on_passed` is told whether the client sent it, how many messages, and bytes."""
        self.client = client
        self.upstream = upstream
        client.other, upstream.other = upstream, client
        client.tunnel = upstream.tunnel = self
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.code = 0
        self.reason = ""
        self.who = ""
        self.ending = False
        self.leaving = False
        self.idle = 0
        self.idle_s = -(-idle_ms // 1000) + 1  # a second may have begun
        self.deadline = 0  # seconds until it is cut off; 0 for none
        self._on_passed = on_passed
        watch.current().add(self)

    def shut(
        self,
        code: int,
        reason: str,
        *,
        who: str,
        client: int | None = None,
        upstream: int | None = None,
    ) -> None:
        """End it: each end is sent `code`, or another one, or (0) its connection is closed."""
        if self.ending:
            return
        self.ending = True
        self._because(who, code, reason)
        self.deadline = CLOSE_S + 1
        for side, own in ((self.client, client), (self.upstream, upstream)):
            side.part(code if own is None else own, reason)

    def abort(self) -> None:
        """Cut both connections at once."""
        self.ending = True
        self._because(GATEWAY, ABNORMAL, "cut off")
        self.client.abort()
        self.upstream.abort()

    def go_away(self) -> None:
        """The gateway stops."""
        self.leaving = True
        self.leave()
        if not self.ending and not self.deadline:
            self.deadline = LEAVE_S + 1

    def leave(self, force: bool = False) -> None:
        """End it for the gateway's sake, unless a frame is under way."""
        if force or not (self.client.left or self.upstream.left):
            self.shut(GOING_AWAY, "the gateway is restarting", who=GATEWAY)

    # For the watch

    def second(self) -> None:
        """A second has passed."""
        if self.deadline:
            self.deadline -= 1
            if not self.deadline:
                if self.ending or self.code:
                    self.abort()
                else:
                    self.leave(force=True)
            return
        self.idle += 1
        if self.idle > self.idle_s:
            self.shut(GOING_AWAY, f"idle for {self.idle_s - 1} s", who=GATEWAY)

    # For the ends

    def passed(self, side: Side, messages: int, payload: int) -> None:
        self._on_passed(side is self.client, messages, payload)

    def closing(self, side: Side, code: int, reason: str) -> None:
        """A close of this end has been passed on."""
        self._because(side.name, code, reason)
        self.deadline = CLOSE_S + 1
        if side.other.closed or side.other.gone:
            self._finish()

    def gone(self, side: Side) -> None:
        """An end has sent its last, and that was passed on."""
        if side.closed:
            return  # it was in a hurry: the other end still answers, or time is up
        if side.other.closed:
            # It went instead of answering a close: that is good enough.
            self._finish()
        elif side is self.client:
            self.shut(ABNORMAL, "connection lost", who=CLIENT, client=0, upstream=0)
        else:
            reason = "the upstream's connection was lost"
            self.shut(ABNORMAL, reason, who=UPSTREAM, client=BAD_GATEWAY, upstream=0)

    def fault(self, side: Side, error: FrameError) -> None:
        """An end broke the protocol, or sent too much."""
        other = BAD_GATEWAY if side is self.upstream else GOING_AWAY
        codes = {side.name: error.code, side.other.name: other}
        self.shut(
            error.code,
            str(error),
            who=side.name,
            client=codes[CLIENT],
            upstream=codes[UPSTREAM],
        )
        # Nothing it sends can be understood any more, so neither can its answer.
        self.deadline = FAULT_S + 1

    def lost(self) -> None:
        """A connection is closed."""
        if self.client.transport is None and self.upstream.transport is None:
            watch.current().remove(self)
            if not self.closed.done():
                self.closed.set_result(None)

    def _because(self, who: str, code: int, reason: str) -> None:
        if not self.code:
            self.who, self.code, self.reason = who, code, reason

    def _finish(self) -> None:
        self.ending = True
        self.client.finish()
        self.upstream.finish()
