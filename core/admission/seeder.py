"""Answers cold subjects: reads the ledger, writes the state, lets the check be tried again.

New subject, evicted key, wiped Redis, a plan that counts something the state lacks, a server that
was restarted, restored or failed over, a correction of an hour that Redis no longer has: one path.
A state of a server that (re)started is compared with the ledger before it decides anything: if the
ledger has seen a later one, Redis came back with older data, and the ledger's replaces it.
Requests of the same subject share one run, and subjects that turn up together share its queries, so
a wiped Redis costs Postgres a few statements per hundred subjects, not one per request.

Steps of a run, and what a crash after each leaves behind:
  1. read the live states                 nothing
  2. claim those without one in Redis,    an epoch nobody uses; a state seeded by another process
     and an epoch for them, for those to  meanwhile is refused by the ledger until it adopts that
     be verified and those behind it      epoch, which the reconciler makes it do
  3. read the ledger                      as 2
  4. write the states (lua/seed.lua)      seeded subjects; the others are cold as before
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from core import ids, keyspace
from core.admission.baseline import cold_fields, warm_fields
from core.admission.ledger import Catalogue, Wanted, read_ledgers
from core.admission.reopen import Lacking, closed_fields, missing, reserved_hours
from core.db.pool import Database
from core.errors import StoreUnavailableError
from core.failpoints import reach
from core.meters import MeterRegistry
from core.policy import Limit
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# Subjects a run takes at once: bounds its statements and how long a subject waits behind others.
_MAX_RUN = 200
# Longer than the ledger may take; what is left behind by a process that died is gone after it.
_CLAIM_MS = 60_000
_KEYSPACE = keyspace.Keyspace()


@dataclass(slots=True)
class _Request:
    subject: str
    key: str
    limits: tuple[Limit, ...] | None  # None: those of the plan that Postgres knows
    now_ms: int
    run: str
    lacking: Lacking
    future: asyncio.Future[None]


@dataclass(slots=True)
class SeedStats:
    runs: int = 0
    cold: int = 0
    warm: int = 0
    rebuilt: int = 0
    conflicts: int = 0
    failures: int = 0


class Seeder:
    """Seeds subjects in runs, one at a time. `catalogue()` gives the one in force.

    `on_seed(kind, count)` is told of subjects that were cold, warm or rebuilt.
    """

    def __init__(
        self,
        redis: Store,
        database: Database | None,
        catalogue: Callable[[], Catalogue],
        registry: MeterRegistry,
        on_seed: Callable[[str, int], None] | None = None,
        space: keyspace.Keyspace = _KEYSPACE,
    ) -> None:
        self._redis = redis
        self._database = database
        self._registry = registry
        self._catalogue = catalogue
        self._script = load("seed")
        self._keyspace = space
        self._waiting: dict[str, _Request] = {}
        self._task: asyncio.Task[None] | None = None
        self._on_seed = on_seed
        self.stats = SeedStats()

    async def seed(
        self, subject: str, key: str, limits: tuple[Limit, ...], now_ms: int, run: str
    ) -> None:
        """Returns when the subject has been given what it lacked, and is verified in `run`.

        `now_ms` is Redis time as the cold answer told it. The check may still answer COLD, when the
        state changed meanwhile; then ask again.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer.
        """
        await self._join(subject, key, limits, now_ms, run, Lacking())

    async def restore(self, subject: str, key: str, run: str, lacking: Lacking) -> None:
        """As `seed`, and closed hours and periods that are to be corrected are brought back.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer.
        """
        await self._join(subject, key, None, await self._redis.now_ms(), run, lacking)

    async def _join(
        self,
        subject: str,
        key: str,
        limits: tuple[Limit, ...] | None,
        now_ms: int,
        run: str,
        lacking: Lacking,
    ) -> None:
        request = self._waiting.get(subject)
        if request is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            request = _Request(subject, key, limits, now_ms, run, lacking, future)
            self._waiting[subject] = request
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
        else:
            request.lacking.merge(lacking)
            request.limits = request.limits or limits
            request.run = run
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
        database = self._database
        if database is None:
            raise StoreUnavailableError("no ledger is configured")
        now_ms = max(request.now_ms for request in requests)
        catalogue = self._catalogue()
        # Step 1
        states = dict(
            zip(
                [request.subject for request in requests],
                await self._redis.hgetall_many([request.key for request in requests]),
                strict=True,
            )
        )
        reach("seed.read")
        # Step 2
        warm = [subject for subject, state in states.items() if state]
        runs = {request.subject: request.run for request in requests}
        # Those to be verified too: a flush of what the server before this one had may be under way.
        # After the claim it stores nothing, so what is compared is final.
        doubtful = {s for s, state in states.items() if state.get(keyspace.RUN) != runs[s]}
        cold = {subject for subject, state in states.items() if not state}
        claims: dict[str, str] = {}
        if cold:
            places = [self._keyspace.claim(subject) for subject in cold]
            held = await self._redis.keep_many(places, ids.ulid(), _CLAIM_MS)
            claims = dict(zip(cold, held, strict=True))
        epochs = await self._claim(database, cold | doubtful)
        behind: set[str] = set()
        for row in await database.fetch("read_epochs", warm) if warm else ():
            subject = row["subject"]
            epochs[subject] = row["epoch"], row["version"]
            if _is_behind(states[subject], row["stored"], row["version"]):
                behind.add(subject)
        epochs |= await self._claim(database, behind - doubtful)
        rebuilt = [subject for subject, state in states.items() if not state or subject in behind]
        reach("seed.claimed")
        # Step 3
        limits = await self._limits(database, requests, catalogue)
        wanted = {
            subject: Wanted(limits[subject], {} if subject in rebuilt else state)
            for subject, state in states.items()
        }
        ledgers = await read_ledgers(database, self._registry, catalogue, wanted, now_ms)
        calls: list[tuple[list[str], list[str | int]]] = []
        for request in requests:
            subject = request.subject
            state, live = states[subject], wanted[subject].live
            if live:
                fields = warm_fields(
                    ledgers[subject], live, catalogue.meters, catalogue.calendars, now_ms
                )
            else:
                fields = cold_fields(
                    ledgers[subject], catalogue.meters, catalogue.calendars, limits[subject], now_ms
                )
            fields |= await self._reopened(database, request, {**live, **fields})
            epoch, version = epochs.get(subject, (0, 0))
            seen = state.get(keyspace.VERSION, "")
            mode = "replace" if subject in behind else ""
            pairs = [part for pair in fields.items() for part in pair]
            space = self._keyspace
            keys = [request.key, space.claim(subject), space.idle(space.shard(subject))]
            claim = claims.get(subject, "")
            calls.append((keys, [seen, epoch, version, request.run, mode, claim, *pairs]))
        reach("seed.ledger_read")
        # Step 4
        answers = await self._redis.run_many(self._script, calls)
        reach("seed.written")
        self.stats.conflicts += sum(1 for answer in answers if answer == 0)
        self._count(cold=len(states) - len(warm), warm=len(warm) - len(behind), behind=behind)

    @staticmethod
    async def _claim(database: Database, subjects: set[str]) -> dict[str, tuple[int, int]]:
        """A new epoch for each, and the ledger's version, which older epochs cannot change."""
        if not subjects:
            return {}
        rows = await database.fetch("claim_epochs", sorted(subjects))
        return {row["subject"]: (row["epoch"], row["version"]) for row in rows}

    def _count(self, cold: int, warm: int, behind: set[str]) -> None:
        self.stats.cold += cold
        self.stats.warm += warm
        self.stats.rebuilt += len(behind)
        for subject in behind:
            _log.warning("state_was_behind_ledger", subject=subject, repair="rebuilt")
        if self._on_seed is not None:
            for kind, count in (("cold", cold), ("warm", warm), ("rebuilt", len(behind))):
                if count:
                    self._on_seed(kind, count)

    async def _limits(
        self, database: Database, requests: list[_Request], catalogue: Catalogue
    ) -> dict[str, tuple[Limit, ...]]:
        """The limits of each subject's plan; a settlement does not know them."""
        found = {r.subject: r.limits for r in requests if r.limits is not None}
        unknown = [r.subject for r in requests if r.limits is None]
        if unknown:
            for row in await database.fetch("plans_of_subjects", unknown):
                plan = catalogue.plans.get(row["plan"])
                found[row["subject"]] = plan.limits if plan is not None else ()
        return {r.subject: found.get(r.subject, ()) for r in requests}

    async def _reopened(
        self, database: Database, request: _Request, live: Mapping[str, str]
    ) -> dict[str, str]:
        lacking = request.lacking
        hours = lacking.hours | reserved_hours(live, lacking.reservations)
        if not hours:
            return {}
        fields, asked = missing(live, hours)
        if asked:
            known = {**live, **fields}
            fields |= await closed_fields(database, self._registry, request.subject, known, asked)
        return fields


def _is_behind(state: Mapping[str, str], stored: int, version: int) -> bool:
    """Whether the ledger has seen a later state than this: `stored` is the epoch of its rows.

    A state starts with the ledger's version, so a lower one is an older state whatever epoch it was
    passed.
    """
    epoch, own = int(state.get(keyspace.EPOCH, 0)), int(state.get(keyspace.VERSION, 0))
    return epoch < stored or own < version


def _unavailable(error: BaseException) -> StoreUnavailableError:
    if isinstance(error, StoreUnavailableError):
        return error
    return StoreUnavailableError(f"the state could not be rebuilt: {error!r}")
