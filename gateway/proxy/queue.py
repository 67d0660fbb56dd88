"""Requests that wait for a connection, in the order of their arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.proxy.connection import UpstreamConnection


class WaitQueue:
    """`give_back` takes a connection that came for somebody who had just stopped waiting.

    `waiters` is to be looked at only: asking whether it is empty costs less than a call of ours.
    """

    __slots__ = ("_give_back", "waiters")

    def __init__(self, give_back: Callable[[UpstreamConnection], None]) -> None:
        self._give_back = give_back
        self.waiters: deque[asyncio.Future[UpstreamConnection | None]] = deque()

    def __len__(self) -> int:
        return len(self.waiters)

    async def wait(self) -> UpstreamConnection | None:
        """A connection handed over; None means that one was closed and may be replaced."""
        waiter: asyncio.Future[UpstreamConnection | None]
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            # Handed over in the same tick as the time-out: pass it on, or it is lost.
            if waiter.done() and not waiter.cancelled():
                conn = waiter.result()
                if conn is None:
                    self.wake_one()
                else:
                    self._give_back(conn)
            elif waiter in self.waiters:
                self.waiters.remove(waiter)
            raise

    def hand_over(self, conn: UpstreamConnection) -> bool:
        """Give a connection to whoever waits longest; False if nobody does."""
        return self._resolve(conn)

    def wake_one(self) -> None:
        """Let whoever waits longest look again."""
        self._resolve(None)

    def _resolve(self, result: UpstreamConnection | None) -> bool:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(result)
                return True
        return False
