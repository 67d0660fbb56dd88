"""How much a client of HTTP/2 may ask for that is no request.

Frames that cost the client nothing to send and us something to read - resets of what was just
asked for (CVE-2023-44487), pings, settings, empty data, header blocks in crumbs - are counted
against budgets that fill up again with time and with the traffic that explains them. Who
overspends is told to calm down and closed.
"""

from __future__ import annotations

from typing import Final

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9

ACK: Final = 1
END_STREAM: Final = 1
END_HEADERS: Final = 4

# A burst, and what comes back each second. A person who closes a page cancels all it asked for.
RESETS: Final = 200
RESETS_PER_S: Final = 20
CONTROL: Final = 1_000
CONTROL_PER_S: Final = 100
# A window update gives room for more data, so what was sent explains them: by frame and by size.
_UPDATES: Final = 1_000
_UPDATES_PER_FRAME: Final = 2
_BYTES_PER_UPDATE: Final = 1024
_CRUMB: Final = 256
# A header block in more frames than this is not made for being read.
_CONTINUATIONS: Final = 32


class Overspent(Exception):
    """`str()` is which budget, as the metric names it."""


class Guard:
    """The budgets of one connection; `tick` is the second it is."""

    __slots__ = ("_block_frames", "_control", "_resets", "_tick", "_updates")

    def __init__(self, tick: int) -> None:
        self._tick = tick
        self._resets = RESETS
        self._control = CONTROL
        self._updates = _UPDATES
        self._block_frames = 0

    def frame(self, kind: int, flags: int, length: int, tick: int) -> None:
        """A frame arrived.

        Raises:
            Overspent: one too many of its kind.
        """
        if kind == DATA:
            if not length and not flags & END_STREAM:
                self.control(tick)
        elif kind == HEADERS:
            self._block_frames = 0
        elif kind == WINDOW_UPDATE:
            self._updates -= 1
            if self._updates < 0:
                self._updates = 0
                self.control(tick)
        elif kind == CONTINUATION:
            self._block_frames += 1
            if self._block_frames > _CONTINUATIONS:
                raise Overspent("h2_continuations")
            self.control(tick)
        else:
            self.control(tick)

    def control(self, tick: int) -> None:
        """Something that is no part of a request."""
        self._control -= 1
        if self._control < 0:
            self._refill(tick)
            if self._control < 0:
                raise Overspent("h2_flood")

    def reset(self, tick: int) -> None:
        """A request that the client, or its number of them, made us give up."""
        self._resets -= 1
        if self._resets < 0:
            self._refill(tick)
            if self._resets < 0:
                raise Overspent("h2_resets")

    def sent(self, size: int, cut: bool) -> None:
        """A frame of data was sent; `cut` where the client had no room for more of it.

        Crumbs that the client made us cut explain nothing: room for one byte after the other
        (CVE-2019-9511) would pay for itself.
        """
        if cut and size < _CRUMB:
            return
        updates = self._updates + _UPDATES_PER_FRAME + size // _BYTES_PER_UPDATE
        self._updates = min(updates, 100 * _UPDATES)

    def _refill(self, tick: int) -> None:
        elapsed, self._tick = tick - self._tick, tick
        self._control = min(CONTROL, self._control + elapsed * CONTROL_PER_S)
        self._resets = min(RESETS, self._resets + elapsed * RESETS_PER_S)
