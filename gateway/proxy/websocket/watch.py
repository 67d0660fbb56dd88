"""One timer a second for all tunnels: one each would cost more than what most of them do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.proxy.websocket.tunnel import Tunnel

_SECOND: Final = 1.0


class Watch:
    """The tunnels of one event loop. The timer runs only while there are some."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._tunnels: set[Tunnel] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, tunnel: Tunnel) -> None:
        self._tunnels.add(tunnel)
        if self._timer is None:
            self._timer = self.loop.call_later(_SECOND, self._tick)

    def remove(self, tunnel: Tunnel) -> None:
        self._tunnels.discard(tunnel)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(_SECOND, self._tick) if self._tunnels else None
        for tunnel in tuple(self._tunnels):
            tunnel.second()


_watch: Watch | None = None


def current() -> Watch:
    """The running loop's watch."""
    global _watch
    loop = asyncio.get_running_loop()
    if _watch is None or _watch.loop is not loop:
        _watch = Watch(loop)
    return _watch
