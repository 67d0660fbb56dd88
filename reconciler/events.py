"""The way of a limit event into Postgres: at least once out of the stream, once into the table.

Steps of `store_once`, the failpoint behind each, and what a crash there leaves behind:
  1. read the oldest entries      events.read      nothing
  2. store_events                 events.stored    stored, still in the stream: stored again it
                                                   changes nothing
  3. delete the entries           events.deleted   done
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal

from core import clock
from core.db import ConstraintError, Database, Row
from core.failpoints import reach
from core.keyspace import Keyspace, subject_of
from core.meters import MeterRegistry
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# In the scripts 101 stands for "above the limit"; people read 100 and the kind.
_EXCEEDED, _FULL = 101, 100


class EventStore:
    """Moves limit events of one shard. `on_event(kind)` is called for each new row."""

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        registry: MeterRegistry,
        *,
        shard: int = 0,
        batch: int = 500,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._store = store
        self._database = database
        self._stream = keyspace.events(shard)
        self._registry = registry
        self._batch = batch
        self._after = ""
        self._on_event = on_event

    async def store_all(self) -> int:
        """Moves everything that is in the stream; returns the number of new rows.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer; what was moved stays moved.
        """
        total = 0
        self._after = ""
        while True:
            read, stored = await self.store_once()
            total += stored
            if read < self._batch:
                return total

    async def store_once(self) -> tuple[int, int]:
        """One batch: entries read, rows that were new.

        An event of a meter that no process has declared yet stays in the stream, and those behind
        it are reached all the same.
        """
        # Step 1
        entries = await self._store.entries(self._stream, self._batch, self._after)
        if not entries:
            return 0, 0
        reach("events.read")
        count = len(entries)
        names = {fields["meter"] for _, fields in entries if "meter" in fields}
        unknown = await self._registry.unknown(self._database, names)
        waiting = [entry_id for entry_id, fields in entries if fields.get("meter") in unknown]
        if waiting:
            _log.error("limit_events_wait", count=len(waiting), unknown_meters=sorted(unknown))
            self._after = waiting[-1]
            entries = [entry for entry in entries if entry[1].get("meter") not in unknown]
        values: list[tuple[object, ...]] = []
        for entry_id, fields in entries:
            try:
                values.append(self._row(entry_id, fields))
            except (KeyError, ValueError, OverflowError) as error:
                _log.error("limit_event_unreadable", id=entry_id, fields=fields, reason=str(error))
        # Step 2
        rows = await self._store_rows(values)
        reach("events.stored")
        # Step 3
        if entries:
            await self._store.delete_entries(self._stream, [entry_id for entry_id, _ in entries])
        reach("events.deleted")
        for row in rows:
            _log.info("limit_event", **dict(row))
            if self._on_event is not None:
                self._on_event(row["kind"])
        return count, len(rows)

    async def _store_rows(self, values: list[tuple[object, ...]]) -> list[Row]:
        """Step 2. A batch with a row that Postgres cannot take is halved until it stands alone."""
        if not values:
            return []
        columns = [list(column) for column in zip(*values, strict=True)]
        try:
            return await self._database.fetch("store_events", *columns)
        except (ConstraintError, ValueError, OverflowError) as error:
            if len(values) == 1:
                _log.error("limit_event_refused", row=values[0], reason=str(error))
                return []
            half = len(values) // 2
            return await self._store_rows(values[:half]) + await self._store_rows(values[half:])

    def _row(self, entry_id: str, fields: Mapping[str, str]) -> tuple[object, ...]:
        threshold = int(fields["threshold"])
        return (
            subject_of(fields["key"]),
            fields["limit"],
            fields["meter"],
            fields["kind"],
            _FULL if threshold == _EXCEEDED else threshold,
            self._quantity(fields["meter"], fields["used"]),
            self._quantity(fields["meter"], fields["max"]),
            clock.to_datetime(int(fields["start"])),
            clock.to_datetime(int(fields["end"])),
            clock.to_datetime(int(fields["at"])),
            entry_id,
        )

    def _quantity(self, name: str, units: str) -> Decimal:
        meter = self._registry.get(name)
        if meter is None:
            raise ValueError(f"no process declared the meter {name}")
        return meter.from_units(int(units))
