"""Settles reservations and corrects totals: what lua/settle.lua is told, and how it is retried.

An operation that finds a state, a closed hour or a closed period missing answers COLD: the seeder
restores them from the ledger, and the operation is sent again. Operations on reservations may be
sent any number of times; adjustments come in numbered batches, each applied once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from core.admission.reopen import Lacking
from core.admission.seeder import Seeder
from core.errors import StoreUnavailableError
from core.keyspace import Keyspace
from core.period import HOUR_MS
from core.policy import Action, Aggregation, Limit, PeriodKind, Plan, Quota
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# Restored once, an operation may meet a concurrent change; more than this is no coincidence.
_MAX_TRIES = 6
_AGGREGATION = {Aggregation.SUM: 1, Aggregation.MAX: 2, Aggregation.LAST: 3}


class Kind(IntEnum):
    """What is done, as lua/settle.lua numbers it."""

    CONFIRM = 1
    REFUND = 2
    EXPIRE = 3
    RENEW = 4
    COST = 5
    ADJUST = 6
    PROGRESS = 7


class Settled(IntEnum):
    """What became of an operation, as lua/settle.lua numbers it."""

    GONE = 0  # no such reservation: settled before, or lost with the state
    DONE = 1
    COLD = 2
    LATE = 4  # a confirmation that nobody waits for any more: nothing is changed
    BROKEN = 5  # the state cannot be read: a person has to look
    UNVERIFIED = 6
    FAILED = 8  # half-way: left out


@dataclass(frozen=True, slots=True)
class Change:
    """Units of a meter, counted at a time in a billing period; `cap` is where overage begins."""

    meter: str
    units: int
    start_ms: int
    end_ms: int
    at_ms: int
    cap: int | None = None
    aggregation: Aggregation = Aggregation.SUM


@dataclass(frozen=True, slots=True)
class Operation:
    """One settlement of a subject.

    `id` names the reservation; `changes` are an adjustment's, or the actual cost's or a progress',
    of which only meter and units count; `ms` is a renewal's or a progress'; after `deadline_ms`,
    unless 0, a confirmation or a progress is LATE. `watch` are quotas whose thresholds a cost or
    a progress may pass (`Program.watch`), and `calendar` the bounds of the days, weeks, months and
    years that are theirs.
    """

    kind: Kind
    subject: str
    id: str = ""
    changes: tuple[Change, ...] = ()
    ms: int = 0
    deadline_ms: int = 0
    watch: str = ""
    calendar: str = ""

    def arguments(self) -> list[str | int]:
        """What the script is told of it."""
        if self.kind in (Kind.COST, Kind.PROGRESS):
            told: list[str | int] = []
            if self.kind is Kind.PROGRESS:
                told += (self.ms, self.deadline_ms)
            told += (self.watch, self.calendar)
            for change in self.changes:
                told += (change.meter, change.units)
            return [int(self.kind), self.id, len(told), *told]
        numbers: list[str | int] = [self.ms] if self.kind is Kind.RENEW else []
        if self.deadline_ms:
            numbers.append(self.deadline_ms)
        for c in self.changes:
            cap = "" if c.cap is None else c.cap
            numbers += (c.meter, _AGGREGATION[c.aggregation], c.units, c.start_ms, c.end_ms)
            numbers += (c.at_ms, cap)
        return [int(self.kind), self.id, len(numbers), *numbers]


def cap_of(plan: Plan, meter: str) -> int | None:
    """Where overage of a meter begins: the plan's lowest billing quota that charges for it."""
    limits: Sequence[Limit] = plan.limits
    caps = [
        limit.limit
        for limit in limits
        if isinstance(limit, Quota)
        and limit.meter == meter
        and limit.period is PeriodKind.BILLING
        and limit.enforce
        and limit.action is Action.OVERAGE
    ]
    return min(caps, default=None)


class Settlement:
    """Sends operations of one shard, restoring from the ledger what they lack."""

    def __init__(self, store: Store, seeder: Seeder, keyspace: Keyspace, *, shard: int = 0) -> None:
        self._store = store
        self._seeder = seeder
        self._keyspace = keyspace
        self._shard = shard
        self._script = load("settle")

    async def settle(self, operations: Sequence[Operation], run: str) -> list[Settled]:
        """Settles reservations; what became of each, DONE, GONE, LATE, BROKEN or FAILED.

        One that is COLD or UNVERIFIED was not settled, as its subject could not be restored: that
        must not hide what became of the others. It may be sent again.

        Raises:
            StoreUnavailableError: Redis did not answer; what was done may be sent again.
        """
        pending = list(enumerate(operations))
        found = [Settled.COLD] * len(operations)
        for _ in range(_MAX_TRIES):
            answers = await self._send([o for _, o in pending], run, "", None)
            again: list[tuple[int, Operation]] = []
            for (at, operation), answer in zip(pending, answers, strict=True):
                found[at] = Settled(answer)
                if found[at] in (Settled.COLD, Settled.UNVERIFIED):
                    again.append((at, operation))
            failed = await self._restore([o for _, o in again], run)
            pending = [(at, o) for at, o in again if o.subject not in failed]
            if not pending:
                break
        return found

    async def adjust(
        self, operations: Sequence[Operation], run: str, sender: str, number: int
    ) -> bool:
        """Applies a numbered batch of a sender, whole; False when it had been applied before.

        Raises:
            StoreUnavailableError: a store did not answer; send the same batch again.
        """
        # Oldest first, so that none finds its hour or period closed by another of the same batch.
        ordered = sorted(
            operations,
            key=lambda o: min(((c.start_ms, c.at_ms) for c in o.changes), default=(0, 0)),
        )
        for _ in range(_MAX_TRIES):
            answers = await self._send(ordered, run, sender, number)
            if answers and answers[0] == -1:
                return False
            lacking = [
                at
                for at, answer in enumerate(answers)
                if answer in (Settled.COLD, Settled.UNVERIFIED)
            ]
            for operation, answer in zip(ordered, answers, strict=False):
                if answer == Settled.BROKEN:
                    raise StoreUnavailableError(
                        f"the state of {operation.subject} cannot be read; delete its hash"
                    )
                if answer == Settled.FAILED:
                    _log.error("adjustment_failed", operation=repr(operation))
            if not lacking:
                return True
            # It stops at the first that lacks something: the same may hold for all behind it.
            first = lacking[0]
            for error in (await self._restore(ordered[first:], run)).values():
                raise error
        raise StoreUnavailableError("the subjects' states kept changing; nothing was adjusted")

    async def _send(
        self, operations: Sequence[Operation], run: str, sender: str, number: int | None
    ) -> list[int]:
        keyspace = self._keyspace
        keys = [keyspace.dirty(self._shard), keyspace.due(self._shard)]
        keys += (keyspace.sender(self._shard, sender), keyspace.events(self._shard))
        arguments: list[str | int] = [run, "" if number is None else number]
        for operation in operations:
            keys.append(keyspace.state(operation.subject))
            arguments += operation.arguments()
        answers: list[int] = await self._store.run(self._script, keys, arguments)
        return answers

    async def _restore(
        self, operations: Sequence[Operation], run: str
    ) -> dict[str, StoreUnavailableError]:
        """Brings back what is lacking; the subjects for which that failed."""
        wanted: dict[str, Lacking] = {}
        for operation in operations:
            lacking = wanted.setdefault(operation.subject, Lacking())
            if operation.id:
                lacking.reservations.add(operation.id)
                continue
            for c in operation.changes:
                lacking.hours.add((c.meter, c.start_ms, c.end_ms, c.at_ms - c.at_ms % HOUR_MS))
        results = await asyncio.gather(
            *(
                self._seeder.restore(subject, self._keyspace.state(subject), run, lacking)
                for subject, lacking in wanted.items()
            ),
            return_exceptions=True,
        )
        failed: dict[str, StoreUnavailableError] = {}
        for subject, result in zip(wanted, results, strict=True):
            if isinstance(result, StoreUnavailableError):
                failed[subject] = result
            elif isinstance(result, BaseException):
                raise result
        return failed
