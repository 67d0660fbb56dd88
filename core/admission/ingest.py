"""Usage that is reported and not proxied: one event, counted once by its id.

An event goes through the same script, counters and ledger as a request; quotas apply to it, rates
and windows do not. Its id is looked for in Postgres, then remembered by the script in the same
atomic step that counts it, so a retry is free at any time later, and one that meets the first
attempt finds it too. A lost answer is no doubt either: ask again with the same id.

  1. look the id up in Postgres      stored before: nothing is counted
  2. lua/admit.lua                   counted, remembered, and handed to the reconciler on a stream;
                                     or refused by a quota, and nothing is counted
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

import orjson

from core import ids
from core.admission.program import CalendarUse, Verdict, compile_program
from core.admission.seeder import Seeder
from core.db import Database
from core.errors import InvalidValueError, StoreUnavailableError
from core.keyspace import Keyspace
from core.period import Span, billing_period, calendar_bounds
from core.policy import MAX_EXACT, Limit, Meter, Plan
from core.redis.scripts import load
from core.redis.store import Store

_MAX_TRIES = 6
_NO_DEADLINE = 2**52  # an answer that comes late is still right: the id is remembered
# No run that was learnt before: the next connection may lead to a server that came back with older
# data, whose states still say that they were verified in it.
_THIS_RUN = "?"
LONGEST_ID = 255
MOST_METADATA = 64 * 1024
_LATEST_MS = 253_402_300_799_999  # the last of the year 9999
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # the escape of one, and no text that looks like it


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """`quantity` is in units of the meter; `occurred_at_ms` is what the reporter says."""

    id: str
    meter: str
    quantity: Decimal
    occurred_at_ms: int
    metadata: Mapping[str, Any] | None = None


class Ingest(Enum):
    COUNTED = "counted"
    DUPLICATE = "duplicate"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class LimitAnswer:
    """A quota after the event, or as it stands when the event was refused. Smallest units."""

    limit: Limit
    flags: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class Ingested:
    """What became of an event; a duplicate has no limits."""

    outcome: Ingest
    at_ms: int = 0
    period: Span = (0, 0)
    limits: tuple[LimitAnswer, ...] = ()


class Ingestor:
    """Counts usage events of one deployment. `meters` and `calendars` are of the configuration."""

    def __init__(
        self,
        store: Store,
        database: Database,
        seeder: Seeder,
        keyspace: Keyspace,
        meters: Mapping[str, Meter],
        calendars: CalendarUse,
    ) -> None:
        self._store = store
        self._database = database
        self._seeder = seeder
        self._keyspace = keyspace
        self._meters = meters
        self._calendars = calendars
        self._script = load("admit")
        self._sender = f"ingest-{ids.ulid()}"
        self._number = 0

    async def count(self, subject: str, plan: Plan, anchor_ms: int, event: UsageEvent) -> Ingested:
        """Counts an event of a subscription on a plan.

        Raises:
            InvalidValueError: a field of the event is wrong.
            StoreUnavailableError: a store did not answer; ask again with the same id.
        """
        meter, units = self._units(event)
        text = _text(event)
        # Step 1
        if await self._database.fetchrow("usage_event", subject, event.id) is not None:
            return Ingested(Ingest.DUPLICATE)
        # Step 2
        program = compile_program(
            plan, {meter.name: units}, self._meters, self._calendars, event=True
        )
        key = self._keyspace.state(subject)
        now_ms = await self._store.now_ms()
        for _ in range(_MAX_TRIES):
            span = billing_period(anchor_ms, plan.interval_months, now_ms)
            numbers = await self._ask(program.text, subject, key, event.id, span, now_ms, text)
            now_ms, status = numbers[0], Verdict(numbers[1])
            if status in (Verdict.ADMIT, Verdict.REJECT):
                outcome = Ingest.COUNTED if status is Verdict.ADMIT else Ingest.REFUSED
                return Ingested(outcome, now_ms, span, _limits(program.limits, numbers))
            if status is Verdict.DUPLICATE:
                return Ingested(Ingest.DUPLICATE, now_ms, span)
            if status in (Verdict.COLD, Verdict.UNVERIFIED):
                run = await self._store.run_id()
                await self._seeder.seed(subject, key, plan.limits, now_ms, run)
            elif status is not Verdict.STALE:
                raise StoreUnavailableError(f"the state of {subject} cannot be read")
        raise StoreUnavailableError("the subject's state kept changing; nothing was counted")

    def _units(self, event: UsageEvent) -> tuple[Meter, int]:
        if not (isinstance(event.id, str) and 0 < len(event.id) <= LONGEST_ID):
            raise InvalidValueError(f"id: write text of 1 to {LONGEST_ID} characters")
        if not event.id.isprintable():
            raise InvalidValueError(f"id: {event.id[:40]!r}: write printable characters")
        meter = self._meters.get(event.meter) if isinstance(event.meter, str) else None
        if meter is None:
            raise InvalidValueError(
                f"meter: {event.meter!r}: not declared; one of {', '.join(sorted(self._meters))}"
            )
        if not isinstance(event.quantity, Decimal):
            raise InvalidValueError(f"quantity: {event.quantity!r}: write a decimal number")
        if not event.quantity.is_finite() or event.quantity <= 0:
            raise InvalidValueError(f"quantity: {event.quantity}: write a number above 0")
        if event.quantity.adjusted() > len(str(MAX_EXACT)):
            raise InvalidValueError("quantity: too large to be counted exactly")
        try:
            units = meter.to_units(event.quantity)
        except ValueError as error:
            raise InvalidValueError(f"quantity: {error}; round it") from error
        if units > MAX_EXACT:
            raise InvalidValueError("quantity: too large to be counted exactly")
        return meter, units

    async def _ask(
        self, program: bytes, subject: str, key: str, name: str, span: Span, now_ms: int, text: str
    ) -> list[int]:
        keyspace = self._keyspace
        shard = keyspace.shard(subject)
        self._number += 1
        keys = [
            keyspace.dirty(shard),
            keyspace.events(shard),
            keyspace.due(shard),
            keyspace.sender(shard, self._sender),
            keyspace.ingested(shard),
            key,
            keyspace.event(subject, name),
        ]
        arguments: list[str | int] = [1, *calendar_bounds(now_ms), _NO_DEADLINE, _THIS_RUN]
        arguments += [self._number, program.decode(), 1, *span, text]
        numbers: list[int] = await self._store.run(self._script, keys, arguments)
        return numbers


def _limits(limits: tuple[Limit, ...], numbers: Sequence[int]) -> tuple[LimitAnswer, ...]:
    return tuple(
        LimitAnswer(limit, *numbers[2 + 3 * at : 5 + 3 * at]) for at, limit in enumerate(limits)
    )


def _text(event: UsageEvent) -> str:
    # Once it is counted it has to go into Postgres: what that does not take is refused here.
    at_ms = event.occurred_at_ms
    if type(at_ms) is not int or not 0 <= at_ms <= _LATEST_MS:
        raise InvalidValueError(f"occurred_at: {at_ms!r}: write a time between 1970 and 9999")
    body: dict[str, Any] = {"id": event.id, "occurred_at": at_ms}
    if event.metadata is not None:
        if not isinstance(event.metadata, Mapping):
            raise InvalidValueError("metadata: write an object")
        body["metadata"] = dict(event.metadata)
    try:
        data = orjson.dumps(body)
    except TypeError as error:
        raise InvalidValueError(f"metadata: {error}: write what JSON can hold") from error
    if len(data) > MOST_METADATA:
        raise InvalidValueError(f"metadata: {len(data)} bytes: {MOST_METADATA} at most")
    text = data.decode()
    if _NUL.search(text):
        raise InvalidValueError("metadata: Postgres keeps no NUL; leave it out")
    return text
