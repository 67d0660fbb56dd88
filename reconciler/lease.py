"""A named lease in Postgres: of several reconcilers one works, another takes over.

The holder renews a third of the lease's time after each renewal; Postgres' clock decides when it
has run out. A process that was killed or stopped is replaced within a second of that. The holder
itself counts from before it asked, on its own monotonic clock, so it never believes to hold it
longer than Postgres does. It starts no new round from then on; one under way may end, also in a
process that was stopped and wakes: every round may be repeated or run twice.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable

from core import clock
from core.db import Database
from core.errors import StoreUnavailableError
from core.telemetry import logs

_log = logs.get_logger()

_RENEWALS = 3  # attempts within the time of a lease
_ASK_S = 1.0  # how often at least who waits for it asks: a lease given back is taken at once


def holder_id() -> str:
    """Who holds a lease: host, process and a part that no restart repeats."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


class Lease:
    """The lease `name`, wanted by `holder`.

    Args:
        database: one with a connection for it alone, or a renewal waits behind the work.
        ttl_ms: the lease's time, asked at each renewal.
        on_change: told whether it is held, at each change.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        holder: str,
        ttl_ms: Callable[[], int],
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        self._database = database
        self._name = name
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._on_change = on_change
        self._until = 0.0
        self._told = False
        self._renewed = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether this process may start a round now."""
        return clock.monotonic() < self._until

    async def wait(self) -> None:
        """Returns when it is held."""
        while not self.held:
            self._renewed.clear()
            await self._renewed.wait()

    async def keep(self) -> None:
        """Acquires and renews until cancelled; Postgres being away is waited out."""
        while True:
            await self.renew()
            renewal = self._ttl_ms() / 1000 / _RENEWALS
            await asyncio.sleep(renewal if self.held else min(renewal, _ASK_S))

    async def renew(self) -> bool:
        """One attempt to acquire or renew; whether it is held after it. Never raises."""
        ttl_ms = self._ttl_ms()
        started = clock.monotonic()
        try:
            async with asyncio.timeout(ttl_ms / 1000 / _RENEWALS):
                mine = await self._database.fetchval(
                    "acquire_lease", self._name, self._holder, ttl_ms
                )
        except (StoreUnavailableError, TimeoutError) as error:
            _log.warning("lease_not_renewed", lease=self._name, reason=str(error) or "no answer")
        except Exception:
            _log.exception("lease_failed", lease=self._name)
        else:
            self._until = started + ttl_ms / 1000 if mine else 0.0
        self._tell()
        return self.held

    async def release(self) -> None:
        """Gives it back, so that another process takes over at once. Never raises."""
        was = self._until
        self._until = 0.0
        self._tell()
        if not was:
            return
        try:
            async with asyncio.timeout(self._ttl_ms() / 1000):
                await self._database.execute("release_lease", self._name, self._holder)
        except (StoreUnavailableError, TimeoutError):
            _log.warning("lease_not_released", lease=self._name)  # it runs out by itself

    def _tell(self) -> None:
        held = self.held
        if held:
            self._renewed.set()
        if held == self._told:
            return
        self._told = held
        _log.info("lease_gained" if held else "lease_lost", lease=self._name, holder=self._holder)
        if self._on_change is not None:
            self._on_change(held)
