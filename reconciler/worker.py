"""The reconciler's tasks, supervised: each goes on after an error, and all drain at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any

from core import clock
from core.config import ConfigWatcher, Snapshot, restart_needed
from core.db import Database, connect_pool
from core.errors import ConfigError, StoreUnavailableError, TallygateError
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.redis.store import Store
from core.telemetry import logs
from core.telemetry.metrics import Metrics, setup
from reconciler.events import EventStore
from reconciler.flush import Flusher

_log = logs.get_logger()

_REDIS_TIMEOUT_S = 5.0
# After a failure of a store: soon, since the counts only wait, but not in a tight loop.
_RETRY_S = 1.0


class Reconciler:
    """Everything one reconciler process runs. Several may run at once; they only repeat work."""

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
        """Runs until `stop`, then flushes once more.

        Raises:
            ConfigError: a meter is pinned otherwise than the configuration declares it.
        """
        settings = self.config.current.settings
        store = Store.connect(self._redis_url, _REDIS_TIMEOUT_S, self._redis_error)
        database: Database = await connect_pool(
            self._postgres_url,
            size=settings.postgres.pool,
            timeout_s=settings.postgres.timeout_ms / 1000,
            on_query=self._on_query,
            require=False,
        )
        keyspace = Keyspace()
        flusher = Flusher(
            store, database, keyspace, self._registry, batch=settings.reconciler.batch
        )
        events = EventStore(
            store,
            database,
            keyspace,
            self._registry,
            on_event=lambda kind: self.metrics.limit_events.labels(kind).inc(),
        )
        self.metrics.config_applied(self.config.current.digest)
        _log.info("started", flush_interval_ms=settings.reconciler.flush_interval_ms)
        watcher = asyncio.create_task(self.config.run(), name="config-watcher")
        try:
            while not self._stopping.is_set():
                await self._round(database, flusher, events)
                interval = self.config.current.settings.reconciler.flush_interval_ms / 1000
                with suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await self._stopping.wait()
            await self._round(database, flusher, events)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await store.close()
            await database.close()
            _log.info("stopped")

    async def _round(self, database: Database, flusher: Flusher, events: EventStore) -> None:
        ready = await self._attempt(self._show_lag(flusher))
        # Nothing is converted before it is known that the ledger's meters are the configuration's.
        if ready and await self._attempt(self._pin(database)):
            # Events do not wait for counts that cannot be stored.
            ready = await self._attempt(self._flush(flusher))
            ready = await self._attempt(events.store_all()) and ready
        else:
            ready = False
        if not ready:
            await self._pause()

    async def _attempt(self, step: Awaitable[object]) -> bool:
        try:
            await step
        except ConfigError:
            raise
        except StoreUnavailableError as error:
            # Redis keeps the truth; the lag metric shows that the ledger is behind.
            _log.warning("flush_postponed", reason=str(error))
        except Exception:
            # A bug in one round must not end the process: the counts wait in Redis, the lag shows.
            _log.exception("flush_failed")
        else:
            return True
        return False

    async def _show_lag(self, flusher: Flusher) -> None:
        dirty, lag_ms = await flusher.lag()
        self.metrics.dirty_subjects.set(dirty)
        self.metrics.flush_lag_seconds.set(lag_ms / 1000)

    async def _pin(self, database: Database) -> None:
        if not self._registry.pinned:
            await self._registry.pin(database)

    async def _flush(self, flusher: Flusher) -> None:
        started = clock.monotonic()
        result = await flusher.flush_all()
        self.metrics.flush_subjects.inc(result.stored)
        self.metrics.flush_seconds.observe(clock.monotonic() - started)
        await self._show_lag(flusher)

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETRY_S):
                await self._stopping.wait()

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
