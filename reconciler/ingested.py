"""The way of a usage event into Postgres: counted by the script, stored here, once by its id.

Steps of `store_once`, and what a crash after each leaves behind:
  1. read the oldest entries         ingest.read     nothing
  2. store_usage_events              ingest.stored   stored, still in the stream: stored again it
                                                     changes nothing
  3. let the ids be forgotten in     ingest.deleted  done; between the two, as 2
     a while, then delete the entries
An id is remembered in Redis until its row is here, and for a day after that, so that whoever looks
here first and there next finds it in one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from core import clock
from core.db import ConstraintError, Database
from core.failpoints import reach
from core.keyspace import Keyspace, subject_of
from core.meters import MeterRegistry
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

_REMEMBER_MS = 86_400_000


class IngestStore:
    """Moves the usage events of one shard. `on_stored(count)` is told of new rows."""

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        registry: MeterRegistry,
        *,
        shard: int = 0,
        batch: int = 500,
        on_stored: Callable[[int], None] | None = None,
    ) -> None:
        self._store = store
        self._database = database
        self._stream = keyspace.ingested(shard)
        self._registry = registry
        self._batch = batch
        self._on_stored = on_stored

    async def store_all(self) -> int:
        """Moves all that is in the stream; how many rows were new.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer; what was moved stays moved.
        """
        total, after = 0, ""
        while True:
            read, stored, after = await self.store_once(after)
            total += stored
            if read < self._batch:
                return total

    async def store_once(self, after: str = "") -> tuple[int, int, str]:
        """One batch behind the entry `after`: entries read, new rows, and the last that stays."""
        # Step 1
        entries = await self._store.entries(self._stream, self._batch, after)
        if not entries:
            return 0, 0, after
        reach("ingest.read")
        unknown = await self._registry.unknown(
            self._database, {fields["meter"] for _, fields in entries}
        )
        rows: list[tuple[object, ...]] = []
        taken: list[tuple[str, str]] = []
        for entry_id, fields in entries:
            try:
                if fields["meter"] in unknown:
                    raise ValueError(f"no process declared the meter {fields['meter']}")
                rows.append(self._row(fields))
                taken.append((entry_id, fields["memo"]))
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                # It was counted: it stays, and a person has to look.
                _log.error("usage_event_waits", id=entry_id, reason=str(error))
                after = entry_id
        # Step 2
        stored = await self._insert(rows) if rows else 0
        reach("ingest.stored")
        # Step 3
        if taken:
            await self._store.expire_many([memo for _, memo in taken], _REMEMBER_MS)
            await self._store.delete_entries(self._stream, [entry_id for entry_id, _ in taken])
        reach("ingest.deleted")
        if stored and self._on_stored is not None:
            self._on_stored(stored)
        return len(entries), stored, after

    async def _insert(self, rows: list[tuple[object, ...]]) -> int:
        columns = [list(column) for column in zip(*rows, strict=True)]
        try:
            return await self._database.execute("store_usage_events", *columns)
        except (ConstraintError, ValueError, OverflowError) as error:
            if len(rows) == 1:
                _log.error("usage_event_refused", row=rows[0][:4], reason=str(error))
                return 0
            half = len(rows) // 2
            return await self._insert(rows[:half]) + await self._insert(rows[half:])

    def _row(self, fields: Mapping[str, str]) -> tuple[object, ...]:
        event: dict[str, Any] = orjson.loads(fields["event"])
        meter = self._registry.get(fields["meter"])
        assert meter is not None, fields["meter"]
        metadata = event.get("metadata")
        return (
            subject_of(fields["key"]),
            event["id"],
            meter.name,
            meter.from_units(int(fields["units"])),
            clock.to_datetime(event["occurred_at"]),
            clock.to_datetime(int(fields["at"])),
            clock.to_datetime(int(fields["start"])),
            clock.to_datetime(int(fields["hour"])),
            None if metadata is None else orjson.dumps(metadata).decode(),
        )
