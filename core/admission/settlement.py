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


class Settled(IntEnum):
    """What became of an operation, as lua/settle.lua numbers it."""

    GONE = 0  # no such reservation: settled before, or lost with the state
    DONE = 1
    COLD = 2
    LATE = 4  # a confirmation after the time until which it was waited for; nothing was done
    UNVERIFIED = 6


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

    `id` names the reservation; `changes` are an adjustment's, or the actual cost's, of which only
    meter and units count; `ms` is a renewal's, or the time until which a confirmation is waited for
    by Redis' clock, 0 for ever.
    """

    kind: Kind
    subject: str
    id: str = ""
    changes: tuple[Change, ...] = ()
    ms: int = 0

    def arguments(self) -> list[str | int]:
        """What the script is told of it."""
        timed = self.ms and self.kind in (Kind.RENEW, Kind.CONFIRM)
        numbers: list[str | int] = [self.ms] if timed else []
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
        """Settles reservations; what became of each, DONE, GONE or LATE.

        Raises:
            StoreUnavailableError: a store did not answer; what was done may be sent again.
        """
        pending = list(enumerate(operations))
        found = [Settled.GONE] * len(operations)
        for _ in range(_MAX_TRIES):
            answers = await self._send([o for _, o in pending], run, "", None)
            again: list[tuple[int, Operation]] = []
            for (at, operation), answer in zip(pending, answers, strict=True):
                found[at] = Settled(answer)
                if found[at] in (Settled.COLD, Settled.UNVERIFIED):
                    again.append((at, operation))
            if not again:
                return found
            pending = again
            await self._restore([o for _, o in pending], run)
        raise StoreUnavailableError("the subjects' states kept changing; nothing was settled")

    async def adjust(
        self, operations: Sequence[Operation], run: str, sender: str, number: int
    ) -> bool:
        """Applies a numbered batch of a sender, whole; False when it had been applied before.

        Raises:
            StoreUnavailableError: a store did not answer; send the same batch again.
        """
        # Oldest first, so that none finds its hour closed by another of the same batch.
        ordered = sorted(operations, key=lambda o: min((c.at_ms for c in o.changes), default=0))
        for _ in range(_MAX_TRIES):
            answers = await self._send(ordered, run, sender, number)
            if answers and answers[0] == -1:
                return False
            lacking = [
                at
                for at, answer in enumerate(answers)
                if answer in (Settled.COLD, Settled.UNVERIFIED)
            ]
            if not lacking:
                return True
            # It stops at the first that lacks something: the same may hold for all behind it.
            first = lacking[0]
            await self._restore(ordered[first:], run)
        raise StoreUnavailableError("the subjects' states kept changing; nothing was adjusted")

    async def _send(
        self, operations: Sequence[Operation], run: str, sender: str, number: int | None
    ) -> list[int]:
        keyspace = self._keyspace
        keys = [keyspace.dirty(self._shard), keyspace.due(self._shard)]
        keys.append(keyspace.sender(self._shard, sender))
        arguments: list[str | int] = [run, "" if number is None else number]
        for operation in operations:
            keys.append(keyspace.state(operation.subject))
            arguments += operation.arguments()
        answers: list[int] = await self._store.run(self._script, keys, arguments)
        return answers

    async def _restore(self, operations: Sequence[Operation], run: str) -> None:
        wanted: dict[str, Lacking] = {}
        for operation in operations:
            lacking = wanted.setdefault(operation.subject, Lacking())
            if operation.id:
                lacking.reservations.add(operation.id)
                continue
            for c in operation.changes:
                lacking.hours.add((c.meter, c.start_ms, c.end_ms, c.at_ms - c.at_ms % HOUR_MS))
        await asyncio.gather(
            *(
                self._seeder.restore(subject, self._keyspace.state(subject), run, lacking)
                for subject, lacking in wanted.items()
            )
        )
