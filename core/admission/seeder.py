"""Answers cold subjects: reads the ledger, writes the state, lets the check be tried again.

New subject, evicted key, wiped Redis, a plan that counts something the state lacks: one path.
Requests of the same subject share one run, and subjects that turn up together share its queries, so
a wiped Redis costs Postgres a few statements per hundred subjects, not one per request.

Steps of a run, and what a crash after each leaves behind:
  1. read the live states                 nothing
  2. claim an epoch for those without one an epoch nobody uses; a state seeded by another process
                                          meanwhile is refused by the ledger until it adopts that
                                          epoch, which the reconciler makes it do
  3. read the ledger                      as 2
  4. write the states (lua/seed.lua)      seeded subjects; the others are cold as before
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from core import keyspace
from core.admission.baseline import cold_fields, warm_fields
from core.admission.ledger import Catalogue, Wanted, read_ledgers
from core.db.pool import Database
from core.errors import StoreUnavailableError
from core.meters import MeterRegistry
from core.policy import Limit
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# Subjects a run takes at once: bounds its statements and how long a subject waits behind others.
_MAX_RUN = 200


@dataclass(slots=True)
class _Request:
    subject: str
    key: str
    limits: tuple[Limit, ...]
    now_ms: int
    future: asyncio.Future[None]


@dataclass(slots=True)
class SeedStats:
    runs: int = 0
    cold: int = 0
    warm: int = 0
    conflicts: int = 0
    failures: int = 0


class Seeder:
    """Seeds subjects in runs, one at a time. `catalogue()` gives the one in force."""

    def __init__(
        self,
        redis: Store,
        database: Database | None,
        catalogue: Callable[[], Catalogue],
        registry: MeterRegistry,
    ) -> None:
        self._redis = redis
        self._database = database
        self._registry = registry
        self._catalogue = catalogue
        self._script = load("seed")
        self._waiting: dict[str, _Request] = {}
        self._task: asyncio.Task[None] | None = None
        self.stats = SeedStats()

    async def seed(self, subject: str, key: str, limits: tuple[Limit, ...], now_ms: int) -> None:
        """Returns when the subject has been given what it lacked.

        `now_ms` is Redis time as the cold answer told it. The check may still answer COLD, when the
        state changed meanwhile; then ask again.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer.
        """
        request = self._waiting.get(subject)
        if request is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            request = self._waiting[subject] = _Request(subject, key, limits, now_ms, future)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
        # shielded: one client that leaves must not cancel the others' run
        await asyncio.shield(request.future)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        # a run that was cancelled before its first step has told nobody
        self._fail(list(self._waiting.values()), StoreUnavailableError("shutting down"))
        self._waiting.clear()

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.pop(name) for name in list(self._waiting)[:_MAX_RUN]]
            try:
                await self._try(taken)
            except BaseException as error:  # the process stops: nobody may wait for ever
                self._fail([*taken, *self._waiting.values()], error)
                self._waiting.clear()
                raise

    async def _try(self, taken: list[_Request]) -> None:
        try:
            await self._seed(taken)
        except StoreUnavailableError as error:
            self._fail(taken, error)
        except Exception as error:
            # One subject that cannot be rebuilt must not keep the others from it.
            if len(taken) > 1:
                for request in taken:
                    await self._try([request])
                return
            _log.error("state_not_rebuilt", subject=taken[0].subject, reason=repr(error))
            self._fail(taken, error)
        else:
            for request in taken:
                if not request.future.done():
                    request.future.set_result(None)

    def _fail(self, requests: list[_Request], error: BaseException) -> None:
        self.stats.failures += 1
        for request in requests:
            if not request.future.done():
                request.future.set_exception(_unavailable(error))
                request.future.exception()  # whoever waits has it; nobody may be left

    async def _seed(self, requests: list[_Request]) -> None:
        self.stats.runs += 1
        if self._database is None:
            raise StoreUnavailableError("no ledger is configured")
        now_ms = max(request.now_ms for request in requests)
        catalogue = self._catalogue()
        states = await self._redis.hgetall_many([request.key for request in requests])
        cold = [r.subject for r, state in zip(requests, states, strict=True) if not state]
        warm = [r.subject for r, state in zip(requests, states, strict=True) if state]
        self.stats.cold += len(cold)
        self.stats.warm += len(warm)
        epochs: dict[str, tuple[int, int]] = {}
        for name, subjects in (("claim_epochs", cold), ("read_epochs", warm)):
            if subjects:
                for row in await self._database.fetch(name, subjects):
                    epochs[row["subject"]] = row["epoch"], row["version"]
        wanted = {
            request.subject: Wanted(request.limits, state)
            for request, state in zip(requests, states, strict=True)
        }
        ledgers = await read_ledgers(self._database, self._registry, catalogue, wanted, now_ms)
        calls: list[tuple[list[str], list[str | int]]] = []
        for request, state in zip(requests, states, strict=True):
            ledger = ledgers[request.subject]
            epoch, version = epochs.get(request.subject, (0, 0))
            meters, calendars = catalogue.meters, catalogue.calendars
            if state:
                fields = warm_fields(ledger, state, meters, calendars, now_ms)
            else:
                fields = cold_fields(ledger, meters, calendars, request.limits, now_ms)
            pairs = [part for pair in fields.items() for part in pair]
            seen = state.get(keyspace.VERSION, "")
            calls.append(([request.key], [seen, epoch, version, *pairs]))
        answers = await self._redis.run_many(self._script, calls)
        self.stats.conflicts += sum(1 for answer in answers if answer == 0)


def _unavailable(error: BaseException) -> StoreUnavailableError:
    if isinstance(error, StoreUnavailableError):
        return error
    return StoreUnavailableError(f"the state could not be rebuilt: {error!r}")
