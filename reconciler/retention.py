"""Months of hours: partitions are made ahead, old months become days and are dropped.

Steps of `roll_up`, one transaction for each month, oldest first:
  1. lock out other runs                            nothing
  2. sum its hours up into days                     nothing: rolled back
  3. move the bound between days and hours          nothing: rolled back
  4. drop the partition                             nothing: rolled back
  5. commit                                         done: whoever reads sees days

A month waits, and those after it, while one of its periods is not sealed, or while Redis has counts
from before its end that are not in the ledger. So its hours are final. One may still be stored
again: a subject that was idle closes its last hour when it wakes. Such a row lands in the default
partition, below the bound, where nobody reads it, and is dropped here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from core import clock
from core.db import Database
from core.failpoints import reach
from core.keyspace import Keyspace
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# Partitions that are there before their month: enough for a reconciler that is down for long.
_MONTHS_AHEAD = 2


@dataclass(slots=True)
class RetentionResult:
    """What one run did: partitions made, months rolled up, hours stored again and dropped."""

    made: int = 0
    rolled: int = 0
    repeated: int = 0


def month_of(at: datetime) -> datetime:
    """The first moment of the month, UTC, that holds `at`."""
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def next_month(month: datetime) -> datetime:
    return month_of(month + timedelta(days=32))


class Retention:
    """`database` must allow statements that take as long as a month of hours does."""

    def __init__(
        self, store: Store, database: Database, keyspace: Keyspace, *, shard: int = 0
    ) -> None:
        self._store = store
        self._database = database
        self._dirty_key = keyspace.dirty(shard)

    async def run(self, now_ms: int, hours_ms: int) -> RetentionResult:
        """Makes partitions and rolls up months that ended `hours_ms` before `now_ms` (Redis time).

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer, or a lock was not free; what
                was done stays done.
        """
        result = RetentionResult()
        await self.make_partitions(now_ms, result)
        await self.drop_repeated(result)
        await self.roll_up(now_ms, hours_ms, result)
        return result

    async def make_partitions(self, now_ms: int, result: RetentionResult) -> None:
        """This month's, the next ones', and those of what the default partition holds."""
        months = [month_of(clock.to_datetime(now_ms))]
        for _ in range(_MONTHS_AHEAD):
            months.append(next_month(months[-1]))
        rows = await self._database.fetch("months_without_partition")
        for month in sorted({*months, *(row["month"] for row in rows)}):
            async with self._database.transaction() as transaction:
                await transaction.execute("lock_partitions")
                made = await transaction.fetchval("add_hours_partition", month)
            if made:
                result.made += 1
                _log.info("hours_partition_made", month=f"{month:%Y-%m}")

    async def drop_repeated(self, result: RetentionResult) -> None:
        """Hours of months that are days already; a day that has none of them yet takes them."""
        until = await self._database.fetchval("rolled_until")
        async with self._database.transaction() as transaction:
            await transaction.execute("steady_write")
            await transaction.execute("lock_partitions")
            added = await transaction.execute("roll_up_hours", clock.to_datetime(0), until)
            dropped = await transaction.execute("delete_rolled_hours", until)
        result.repeated += dropped
        if dropped:
            _log.info("repeated_hours_dropped", count=dropped, days_added=added)

    async def roll_up(self, now_ms: int, hours_ms: int, result: RetentionResult) -> None:
        """Turns months into days, oldest first, until one has to wait."""
        for row in await self._database.fetch("months_of_hours"):
            month: datetime = row["month"]
            end = next_month(month)
            if clock.from_datetime(end) > now_ms - hours_ms:
                return
            reason = await self._waits(month, end)
            if reason:
                _log.info("roll_up_waits", month=f"{month:%Y-%m}", reason=reason)
                return
            if await self._roll_up_month(month, end):
                result.rolled += 1

    async def _waits(self, month: datetime, end: datetime) -> str:
        """Why the month cannot be rolled up yet, '' when it can."""
        oldest = await self._store.oldest(self._dirty_key, 1)
        if oldest and oldest[0][1] < clock.from_datetime(end):
            return "Redis has counts of that time which are not in the ledger"
        if await self._database.fetchval("month_is_open", month, end):
            return "a period of it is not sealed"
        return ""

    async def _roll_up_month(self, month: datetime, end: datetime) -> bool:
        """Whether it was still there: another process may have been faster."""
        async with self._database.transaction() as transaction:
            # Step 1
            await transaction.execute("lock_partitions")
            # Steps 2 and 3
            days = await transaction.execute("roll_up_hours", month, end)
            await transaction.execute("rolled_up_to", end)
            reach("retention.rolled_up")
            # Step 4: last, since it locks everybody out who reads or writes hours
            dropped = bool(await transaction.fetchval("drop_hours_partition", month))
            reach("retention.dropped")
        _log.info("hours_rolled_up", month=f"{month:%Y-%m}", days=days)
        return dropped
