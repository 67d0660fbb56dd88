"""Composition root of one gateway worker: opens what it holds and wires it together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from core import clock
from core.admission.seeder import Seeder
from core.admission.settlement import Settlement
from core.config import ConfigWatcher, Snapshot, plans_removed, restart_needed
from core.db import Database, connect_pool
from core.errors import ConfigError
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.redis.scripts import load
from core.redis.store import Store
from core.secrets import KeyHasher
from core.telemetry import logs
from core.telemetry.local import LocalMetrics
from core.telemetry.metrics import Metrics, setup
from gateway.admission.batcher import Batcher
from gateway.admission.check import Unresolved
from gateway.admission.leases import Leases
from gateway.admission.limiter import Limiter
from gateway.admission.settler import Settler
from gateway.answers import problems
from gateway.answers.headers import SERVER
from gateway.auth import Authenticator, KeyCache, KeyExtractor, KeyLoader
from gateway.certificates import Certificates
from gateway.cost.report import CostReport
from gateway.http.exchange import Exchange
from gateway.http.message import Header
from gateway.outage import entries, open_journal
from gateway.outage.commit import SpoolUnavailable
from gateway.outage.decide import Outage
from gateway.outage.replay import Replay
from gateway.responder import Responder
from gateway.runtime import Runtime
from gateway.settings import required
from gateway.websocket.serve import WebSockets

_log = logs.get_logger()

# Answered here whatever the routes say, as a load balancer asks each worker's port.
HEALTH_PATH = "/-/healthz"
READY_PATH = "/-/readyz"

# Seeding and leases are off the hot path; a cold connection needs more than a check's 50 ms.
_STORE_TIMEOUT_S = 1.0


class Gateway:
    """What one worker does with requests. `await open()` first, `await close()` at the end."""

    def __init__(self, path: Path, snapshot: Snapshot, workers: int = 1) -> None:
        settings = snapshot.settings
        self._redis_url, self._postgres_url, pepper = required(snapshot)
        self._hasher = KeyHasher(pepper)
        self.metrics: Metrics = setup(settings.telemetry.metrics_dir, "gateway")
        self.local = LocalMetrics(self.metrics)
        self.config = ConfigWatcher(
            path, snapshot, on_reload=self._reloaded, on_refused=self._refused
        )
        self.tls = self._certificates(snapshot)
        self._workers = workers
        self.runtime = Runtime(snapshot, {}, workers)
        self._keyspace = Keyspace()
        self._registry = MeterRegistry(snapshot.meters, snapshot.source)
        # Also those that a reload has dropped: a request that was matched before it may still ask.
        self._meters = dict(snapshot.meters)
        self._pinning: asyncio.Task[None] | None = None
        # Why the worker must not go on, and what then ends it: set by whoever serves it.
        self.fatal: ConfigError | None = None
        self.on_fatal: Callable[[], object] | None = None
        # The gateway is about to stop: load balancers are told, requests are served.
        self.leaving = False
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def connected(self) -> bool:
        """Both stores answer. Not needed to serve, but to take a worker's place that does."""
        return self._batcher.connected and self._database.healthy

    def leave(self) -> None:
        """Not ready from now on."""
        self.leaving = True

    async def open(self) -> None:
        """Connects. A store that is down is no error: the worker answers 503 and tries again.

        Raises:
            ConfigError: a meter is pinned otherwise than the configuration declares it.
        """
        settings = self.config.current.settings
        loop = asyncio.get_running_loop()
        self._store = Store.connect(self._redis_url, _STORE_TIMEOUT_S, self.local.redis_errors.inc)
        self._database: Database = await connect_pool(
            self._postgres_url,
            size=settings.postgres.pool,
            timeout_s=settings.postgres.timeout_ms / 1000,
            on_query=self._on_query,
            require=False,
        )
        if await self._database.ping():  # so that the health answer is right from the start
            await self._registry.try_pin(self._database)
        self._pin_meters()
        cache_settings = settings.gateway.key_cache
        self.cache = KeyCache(
            size=cache_settings.size,
            ttl_ms=cache_settings.ttl_ms,
            negative_ttl_ms=cache_settings.negative_ttl_ms,
        )
        self._loader = KeyLoader(self._database, self._postgres_url, self.cache, clock=clock.now_ms)
        self._loader.start()
        admission = settings.gateway.admission
        self._journal = open_journal(
            settings.gateway.outage.spool_dir, settings.gateway.outage.spool_max, self._spool_event
        )
        self._batcher = Batcher(
            self._redis_url,
            load("admit"),
            self._keyspace,
            timeout_s=settings.redis.timeout_ms / 1000,
            max_batch=admission.max_batch,
            max_in_flight=admission.max_in_flight,
            on_batch=self._on_batch,
            on_error=self.local.redis_errors.inc,
            on_unresolved=self._unresolved,
        )
        await self._batcher.start()
        self._seeder = Seeder(
            self._store,
            self._database,
            lambda: self.runtime.catalogue,
            self._registry,
            on_seed=lambda kind, count: self.metrics.states_seeded.labels(kind).inc(count),
        )
        self._leases = Leases(self._store)

        def run() -> str | None:
            return self._batcher.connected_run

        outage = Outage(
            self._journal,
            lambda: self._meters,
            lambda mode: self.metrics.outage_admitted.labels(mode).inc(),
            self._journalled,
        )
        settlement = Settlement(self._store, self._seeder, self._keyspace)
        self._settler = Settler(
            settlement,
            run,
            timeout_s=settings.redis.timeout_ms / 1000,
            on_settled=lambda kind, count: self.metrics.settlements.labels(kind).inc(count),
            redis_now_ms=self._batcher.redis_now_ms,
            spill=lambda operation: outage.note(entries.settled(operation)),
        )
        self._replay = Replay(
            self._journal,
            settlement,
            self._store,
            self._keyspace,
            run,
            on_replayed=lambda kind, count: self.metrics.replayed.labels(kind).inc(count),
            on_pending=self.metrics.spool_pending.set,
        )
        self._replay.start()
        self._limiter = Limiter(
            self._batcher,
            self._seeder,
            self._leases,
            self._keyspace,
            self._settler,
            outage,
            on_event=self.local.limit_events.inc,
            costs=CostReport(self.local.costs_settled, self.local.cost_units),
        )
        self._respond = self._responder(self.runtime)
        self._start_pools()
        self.local.before_flush = self._sample_pools
        self.local.start(loop)
        self.metrics.config_applied(self.config.current.digest)
        self._tasks.append(asyncio.create_task(self.config.run(), name="config-watcher"))
        if self.tls is not None:
            self._tasks.append(asyncio.create_task(self.tls.run(), name="certificate-watcher"))

    async def close(self) -> None:
        """Gives leases back and closes everything; waits for no more than the time-outs."""
        for task in (*self._tasks, *([self._pinning] if self._pinning else [])):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # nothing may skip what follows
        with suppress(TimeoutError):
            async with asyncio.timeout(_STORE_TIMEOUT_S * 2):
                await self._leases.close()
                await self._settler.close()
        await self._loader.close()
        await self._replay.close(_STORE_TIMEOUT_S)
        await self._journal.close()
        await self._seeder.close()
        await self._batcher.close()
        for pool in self.runtime.pools.values():
            pool.close()
        await self._store.close()
        await self._database.close()
        self.local.stop()

    def _certificates(self, snapshot: Snapshot) -> Certificates | None:
        tls, metrics = snapshot.settings.gateway.tls, self.metrics
        if tls is None:
            return None
        return Certificates(
            tls,
            on_reload=lambda result: metrics.certificate_reloads.labels(result).inc(),
            on_expiry=lambda file, ends: metrics.certificate_expiry.labels(file).set(ends),
        )

    def _responder(self, runtime: Runtime) -> Responder:
        key = runtime.snapshot.settings.gateway.key
        authenticator = Authenticator(
            extractor=KeyExtractor(key.headers, key.query),
            hasher=self._hasher,
            cache=self.cache,
            loader=self._loader,
            clock=clock.now_ms,
        )
        sockets = WebSockets(self._limiter, authenticator, self.local, lambda: self.runtime)
        return Responder(runtime, authenticator, self._limiter, self.local, sockets)

    # Requests

    def __call__(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """What answers one request; not a coroutine around it, which would be run through too."""
        path = exchange.request.path
        if path.startswith("/-/") and path in (HEALTH_PATH, READY_PATH):
            return self._health(path, exchange)
        return self._respond(exchange)

    def refuse(self, status: int, code: str, detail: str) -> tuple[list[Header], bytes]:
        """The answer to what is no request."""
        self.metrics.unreadable_requests.labels(code).inc()
        problem = problems.unreadable(status, code, detail)
        return [*problem.headers, SERVER], problem.body

    def client_event(self, kind: str) -> None:
        """A connection of a client was ended, or a call answered, by the server itself."""
        self.metrics.client_events.labels(kind).inc()

    async def _health(self, path: str, exchange: Exchange) -> None:
        # Postgres being away is no reason to take a worker out: cached keys go on working.
        ready = path == HEALTH_PATH or (self._batcher.connected and not self.leaving)
        status = "draining" if self.leaving else "ok" if ready else "unavailable"
        body = orjson.dumps(
            {
                "status": status,
                "redis": "ok" if self._batcher.connected else "down",
                "postgres": "ok" if self._database.healthy else "down",
                "config": self.config.current.digest[:12],
            }
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            SERVER,
        ]
        exchange.respond(200 if ready else 503, headers, body)

    # Events

    def _on_batch(self, size: int, _seconds: float) -> None:
        self.local.admission_batch.observe(size)

    def _unresolved(self, batch: Unresolved) -> None:
        """The answer of a batch was lost: what it counted has to be found out, and taken back."""
        if not any(check.program.durable for check in batch.checks):
            return
        try:
            self._journal.append_written(entries.unresolved(batch, self._meters))
        except SpoolUnavailable as error:
            self.metrics.spool_trouble.labels("unresolved_lost").inc()
            _log.error(
                "batch_unresolved", sender=batch.sender, number=batch.number, reason=str(error)
            )
        else:
            self._replay.wake()

    def _journalled(self) -> None:
        self._replay.wake()

    def _spool_event(self, event: str, amount: int) -> None:
        self.metrics.spool_trouble.labels(event).inc(amount)

    def _on_query(self, name: str, seconds: float, ok: bool) -> None:
        self.metrics.postgres_seconds.labels(name).observe(seconds)
        if not ok:
            self.metrics.postgres_errors.inc()

    def _pin_meters(self) -> None:
        """In the background until Postgres has answered; see core/meters.py."""
        if not self._registry.pinned and (self._pinning is None or self._pinning.done()):
            self._pinning = asyncio.create_task(self._pin(), name="meters")

    async def _pin(self) -> None:
        try:
            await self._registry.pin_until_done(self._database)
        except ConfigError as error:
            _log.critical("meters_refused", source=error.source, problems=error.problems)
            self.fatal = error
            if self.on_fatal is not None:
                self.on_fatal()

    def _reloaded(self, old: Snapshot, new: Snapshot) -> None:
        # Whatever can fail comes before the first change: what raises here refuses the reload, and
        # the old configuration must then be in force everywhere.
        self._registry.check(new.meters)
        runtime = Runtime(new, self.runtime.pools, self._workers)
        respond = self._responder(runtime)
        tls = new.settings.gateway.tls
        switch = self.tls.prepare(tls) if self.tls is not None and tls is not None else None
        retired = [pool for up, pool in self.runtime.pools.items() if up not in runtime.pools]
        removed = plans_removed(old, new)
        self.metrics.config_applied(new.digest)
        self._registry.declare(new.meters)
        self._meters.update(new.meters)
        self.runtime, self._respond = runtime, respond
        if switch is not None:
            switch()
        self._pin_meters()
        for pool in retired:
            pool.close()
        self._start_pools()  # after those, whose gauges may have the same labels
        logs.configure(new.settings.log.level, new.settings.log.format, "gateway")
        # Taking a plan out is allowed, but who is still subscribed to it is refused from now on.
        log = _log.warning if removed else _log.info
        log(
            "config_applied",
            digest=new.digest[:12],
            restart_needed=restart_needed(old, new),
            plans_removed=removed,
        )

    def _start_pools(self) -> None:
        for pool in self.runtime.pools.values():
            pool.start(self.metrics)

    def _sample_pools(self) -> None:
        for pool in self.runtime.pools.values():
            pool.sample()

    def _refused(self, error: ConfigError) -> None:
        self.metrics.config_refused()
        _log.error("config_refused", source=error.source, problems=error.problems)


__all__ = ["HEALTH_PATH", "READY_PATH", "Gateway"]
