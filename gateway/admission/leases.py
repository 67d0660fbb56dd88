"""Gives concurrency slots back, and renews those of long requests.

Releases are batched like checks. One that cannot be delivered (Redis away) is dropped: the lease
expires by itself, so the slot comes back within the limit's lease time either way. A request that
runs longer than that renews its leases from here, on one timer for all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from core import clock
from core.errors import StoreUnavailableError
from core.redis.scripts import load
from core.redis.store import Store

# How often leases are looked at for renewal: must be well below the shortest lease (1 s).
_SWEEP_S = 0.25


@dataclass(slots=True, eq=False)
class Held:
    """The leases of one request: one key for each of the plan's concurrency limits."""

    lease: str
    keys: tuple[str, ...]
    lease_ms: tuple[int, ...]
    renew_at: float


class Leases:
    """All leases that requests of this process hold."""

    def __init__(self, redis: Store) -> None:
        self._redis = redis
        self._script = load("release")
        self._held: set[Held] = set()
        self._pending: list[tuple[str, str, int]] = []  # key, lease, 0 or ms
        self._sending: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.lost = 0  # releases and renewals that Redis did not take

    def hold(self, lease: str, keys: tuple[str, ...], lease_ms: tuple[int, ...]) -> Held:
        """Registers what an admission was granted; pass the result to `release`."""
        held = Held(lease, keys, lease_ms, clock.monotonic() + min(lease_ms) / 2000)
        self._held.add(held)
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())
        return held

    def release_unknown(self, lease: str, keys: tuple[str, ...]) -> None:
        """Gives back what an admission may have been granted whose answer never came."""
        self._queue((key, lease, 0) for key in keys)

    def release(self, held: Held) -> None:
        """Gives the slots back soon; never waits, never fails."""
        self._held.discard(held)
        self._queue((key, held.lease, 0) for key in held.keys)

    async def close(self) -> None:
        """Gives back everything and waits until Redis has it."""
        for held in list(self._held):
            self.release(held)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._sending is not None:
            await self._sending

    def _queue(self, operations: Iterable[tuple[str, str, int]]) -> None:
        self._pending.extend(operations)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[:256], self._pending[256:]
            keys = [key for key, _, _ in batch]
            arguments: list[str | int] = []
            for _, lease, lease_ms in batch:
                arguments += (lease, lease_ms)
            try:
                await self._redis.run(self._script, keys, arguments)
            except StoreUnavailableError:
                self.lost += len(batch)

    async def _sweep(self) -> None:
        while self._held:
            await asyncio.sleep(_SWEEP_S)
            now = clock.monotonic()
            for held in self._held:
                if held.renew_at <= now:
                    held.renew_at = now + min(held.lease_ms) / 2000
                    self._queue(
                        (key, held.lease, ms)
                        for key, ms in zip(held.keys, held.lease_ms, strict=True)
                    )
