"""The reconciler's parts put together: what it does, how often, and what it tells the metrics.

| task      | does                                            | while it holds the lease |
|-----------|-------------------------------------------------|--------------------------|
| lag       | shows how far the ledger is behind              | and otherwise            |
| flush     | counts into the ledger                          | only                     |
| events    | limit events into Postgres                      | only                     |
| ingest    | usage events into Postgres                      | only                     |
| expiry    | takes back reservations that nobody settled     | only                     |
| idle      | takes idle subjects out of Redis                | only                     |
| audit     | compares Redis, hours, periods and events       | only                     |
| periods   | closes and seals what has ended                 | only                     |
| retention | partitions ahead, old months into days          | only                     |
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from core import clock
from core.admission.ledger import Catalogue
from core.admission.program import calendar_use
from core.admission.reopen import Lacking
from core.admission.seeder import Seeder
from core.admission.settlement import Settlement
from core.audit import MeterUse, audit, publish
from core.config import ConfigWatcher, Snapshot, restart_needed
from core.config.models import ReconcilerSettings
from core.db import Database, connect_pool
from core.errors import ConfigError, TallygateError
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.redis.store import Store
from core.telemetry import logs
from core.telemetry.metrics import Metrics, setup
from reconciler.events import EventStore
from reconciler.flush import Flusher
from reconciler.idle import evict_idle
from reconciler.ingested import IngestStore
from reconciler.lease import Lease, holder_id
from reconciler.periods import Periods
from reconciler.reservations import Reservations
from reconciler.retention import Retention
from reconciler.supervise import Supervisor, Task

_log = logs.get_logger()

_REDIS_TIMEOUT_S = 5.0
LEASE = "reconciler"

_LAG_S = 1.0
_PERIODS_S = 1.0
_EXPIRY_S = 1.0
_IDLE_S = 60.0
_AUDIT_S = 3_600.0
_RETENTION_S = 3_600.0
_RETENTION_RETRY_S = 60.0
# A month of hours is summed up in one statement.
_MAINTENANCE_TIMEOUT_S = 1_800.0


class Reconciler:
    """Everything one reconciler process runs. Of several, the one with the lease works."""

    def __init__(self, path: Path, snapshot: Snapshot) -> None:
        settings = snapshot.settings
        if not settings.redis.url or not settings.postgres.url:
            name = "redis.url" if not settings.redis.url else "postgres.url"
            variable = f"TALLYGATE_{name.split('.')[0].upper()}_URL"
            raise TallygateError(f"{name}: not set: give it in the configuration or set {variable}")
        self._redis_url = settings.redis.url
        self._postgres_url = settings.postgres.url
        self.metrics: Metrics = setup(settings.telemetry.metrics_dir, "reconciler")
        self.config = ConfigWatcher(
            path, snapshot, on_reload=self._reloaded, on_refused=self._refused
        )
        self._registry = MeterRegistry(snapshot.meters, snapshot.source)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Asks for a last flush and the end."""
        self._stopping.set()

    async def run(self) -> None:
        """Runs until `stop`, then flushes once more and gives the lease back.

        Raises:
            ConfigError: a meter is pinned otherwise than the configuration declares it.
        """
        async with AsyncExitStack() as stack:
            store = Store.connect(self._redis_url, _REDIS_TIMEOUT_S, self._redis_error)
            stack.push_async_callback(store.close)
            timeout_s = self.config.current.settings.postgres.timeout_ms / 1000
            database = await self._connect(
                stack, timeout_s, self.config.current.settings.postgres.pool
            )
            # Of its own: a renewal must not wait behind the work.
            lease_database = await self._connect(stack, timeout_s, 1)
            maintenance = await self._connect(stack, _MAINTENANCE_TIMEOUT_S, 1)
            lease = Lease(
                lease_database,
                LEASE,
                holder_id(),
                lambda: self._settings.lease_ms,
                self._lease_changed,
            )
            self.metrics.config_applied(self.config.current.digest)
            _log.info("started", flush_interval_ms=self._settings.flush_interval_ms)
            helpers = [
                asyncio.create_task(self.config.run(), name="config-watcher"),
                asyncio.create_task(lease.keep(), name="lease"),
            ]
            try:
                await Supervisor(lease, self._stopping).run(
                    self.tasks(store, database, maintenance)
                )
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
                await lease.release()
        _log.info("stopped")

    async def _connect(self, stack: AsyncExitStack, timeout_s: float, size: int) -> Database:
        database = await connect_pool(
            self._postgres_url,
            size=size,
            timeout_s=timeout_s,
            on_query=self._on_query,
            require=False,
        )
        stack.push_async_callback(database.close)
        return database

    @property
    def _settings(self) -> ReconcilerSettings:
        return self.config.current.settings.reconciler

    def tasks(self, store: Store, database: Database, maintenance: Database) -> list[Task]:
        """What runs; `maintenance` allows long statements."""
        keyspace, registry = Keyspace(), self._registry
        seeder = Seeder(store, database, self._catalogue, registry, on_seed=self._on_seed)
        settlement = Settlement(store, seeder, keyspace)
        reservations = Reservations(store, settlement, keyspace)
        ingest = IngestStore(
            store, database, keyspace, registry, on_stored=self.metrics.usage_events.inc
        )

        async def repair(subjects: list[str]) -> None:
            run = await store.run_id()
            await asyncio.gather(
                *(seeder.restore(s, keyspace.state(s), run, Lacking()) for s in subjects)
            )

        flusher = Flusher(
            store,
            database,
            keyspace,
            registry,
            batch=self._settings.batch,
            repair=repair,
            on_lost=self.metrics.states_lost.inc,
            ahead=ingest.store_all,
        )
        events = EventStore(store, database, keyspace, registry, on_event=self._on_event)
        periods = Periods(store, database, keyspace, registry, lambda: self.config.current)
        retention = Retention(store, maintenance, keyspace)

        def often() -> float:
            return self._settings.flush_interval_ms / 1000

        async def lag() -> None:
            await self._show_lag(flusher)
            # One in waiting ends, too, if its meters are not the ledger's: it could not take over.
            await self._pin(database)

        async def flush() -> None:
            await self._pin(database)
            await self._flush(flusher)

        async def store_events() -> None:
            await self._pin(database)
            await events.store_all()

        async def store_usage() -> None:
            await self._pin(database)
            await ingest.store_all()

        async def expire() -> None:
            await self._pin(database)
            self.metrics.settlements.labels("expire").inc(await reservations.expire_due())

        async def evict() -> None:
            gone = await evict_idle(store, keyspace, self.config.current)
            self.metrics.subjects_evicted.inc(gone)

        async def check() -> None:
            await self._pin(database)
            use = MeterUse.of(self.config.current)
            publish(self.metrics, await audit(database, store, registry, use=use))

        async def seal() -> None:
            await self._pin(database)
            await self._seal(store, periods)

        return [
            Task("lag", lag, lambda: max(often(), _LAG_S), alone=False),
            Task("flush", flush, often, drains=True),
            Task("events", store_events, often, drains=True),
            Task("ingest", store_usage, often, drains=True),
            Task("expiry", expire, lambda: _EXPIRY_S),
            Task("idle", evict, lambda: _IDLE_S),
            Task("audit", check, lambda: _AUDIT_S),
            Task("periods", seal, lambda: _PERIODS_S),
            Task(
                "retention",
                lambda: self._retain(store, retention),
                lambda: _RETENTION_S,
                retry_s=_RETENTION_RETRY_S,
            ),
        ]

    def _catalogue(self) -> Catalogue:
        snapshot = self.config.current
        return Catalogue(snapshot.meters, calendar_use(snapshot.plans.values()), snapshot.plans)

    def _on_seed(self, kind: str, count: int) -> None:
        self.metrics.states_seeded.labels(kind).inc(count)

    async def _pin(self, database: Database) -> None:
        """Nothing is converted before the ledger's meters are known to be the configuration's."""
        if not self._registry.pinned:
            await self._registry.pin(database)

    async def _show_lag(self, flusher: Flusher) -> None:
        dirty, lag_ms = await flusher.lag()
        self.metrics.dirty_subjects.set(dirty)
        self.metrics.flush_lag_seconds.set(lag_ms / 1000)

    async def _flush(self, flusher: Flusher) -> None:
        started = clock.monotonic()
        result = await flusher.flush_all()
        self.metrics.flush_subjects.inc(result.stored)
        self.metrics.flush_seconds.observe(clock.monotonic() - started)
        await self._show_lag(flusher)

    async def _seal(self, store: Store, periods: Periods) -> None:
        now_ms = await store.now_ms()
        seal_after_ms = self._settings.seal_after_ms
        result = await periods.seal_due(now_ms, seal_after_ms)
        self.metrics.periods_sealed.inc(result.sealed)
        self.metrics.periods_resealed.inc(result.resealed)
        self.metrics.limit_events.labels("reset").inc(result.resets)
        self.metrics.seal_lag_seconds.set(await periods.lag_ms(now_ms, seal_after_ms) / 1000)

    async def _retain(self, store: Store, retention: Retention) -> None:
        result = await retention.run(await store.now_ms(), self._settings.retention.hours_ms)
        self.metrics.hours_partitions.inc(result.made)
        self.metrics.hours_months_rolled.inc(result.rolled)

    def _lease_changed(self, held: bool) -> None:
        self.metrics.reconciler_leader.set(int(held))
        if not held:
            self.metrics.seal_lag_seconds.set(0)  # another process knows it now

    def _on_event(self, kind: str) -> None:
        self.metrics.limit_events.labels(kind).inc()

    def _on_query(self, name: str, seconds: float, ok: bool) -> None:
        self.metrics.postgres_seconds.labels(name).observe(seconds)
        if not ok:
            self.metrics.postgres_errors.inc()

    def _redis_error(self, kind: str) -> None:
        self.metrics.redis_errors.labels(kind).inc()

    def _reloaded(self, old: Snapshot, new: Snapshot) -> None:
        self._registry.declare(new.meters)  # refuses what would rescale counts
        self.metrics.config_applied(new.digest)
        logs.configure(new.settings.log.level, new.settings.log.format, "reconciler")
        pending: list[Any] = restart_needed(old, new)
        _log.info("config_applied", digest=new.digest[:12], restart_needed=pending)

    def _refused(self, error: ConfigError) -> None:
        self.metrics.config_refused()
        _log.error("config_refused", source=error.source, problems=error.problems)
