"""Composition root: opens what the control process holds and builds its application."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from control import health, problems
from core.config import ConfigWatcher, Snapshot, restart_needed
from core.db import Database, connect_pool
from core.errors import ConfigError, StoreUnavailableError, TallygateError
from core.redis import client as redis_client
from core.telemetry import logs
from core.telemetry.metrics import Metrics, setup

_log = logs.get_logger()


class Control:
    """Stores, configuration and metrics of one control process. Made by `open_control`."""

    def __init__(
        self,
        config: ConfigWatcher,
        metrics: Metrics,
        redis: redis_client.Client,
        database: Database,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.redis = redis
        self.database = database

    async def check_redis(self) -> None:
        """Raises StoreUnavailableError when Redis does not answer a PING in time."""
        try:
            await redis_client.ping(self.redis)
        except StoreUnavailableError:
            self.metrics.redis_errors.labels("connection").inc()
            raise

    async def check_postgres(self) -> None:
        """Raises StoreUnavailableError when Postgres does not answer a query in time."""
        if not await self.database.ping():
            raise StoreUnavailableError("Postgres did not answer; check that it runs")

    async def close(self) -> None:
        """Closes the stores; waits for no more than their time-outs."""
        await self.redis.aclose()
        await self.database.close()


async def open_control(path: Path, snapshot: Snapshot) -> Control:
    """Opens everything from a loaded configuration. Stores that are down are no error.

    Raises:
        TallygateError: no Redis or Postgres is configured, or its URL is none.
    """
    settings = snapshot.settings
    if not settings.redis.url or not settings.postgres.url:
        name = "redis.url" if not settings.redis.url else "postgres.url"
        variable = f"TALLYGATE_{name.split('.')[0].upper()}_URL"
        raise TallygateError(
            f"{name}: not set: give it in {path} or set {variable}; `tallygate up` embeds both"
        )
    metrics = setup(settings.telemetry.metrics_dir, "control")

    def on_query(name: str, seconds: float, ok: bool) -> None:
        metrics.postgres_seconds.labels(name).observe(seconds)
        if not ok:
            metrics.postgres_errors.inc()

    # Of the gateway's 50 ms nothing is left for a cold connection; here nobody waits for an answer.
    redis_timeout_s = max(1.0, settings.redis.timeout_ms / 1000)
    redis = redis_client.connect(settings.redis.url, redis_timeout_s)
    database = await connect_pool(
        settings.postgres.url,
        size=settings.postgres.pool,
        timeout_s=settings.postgres.timeout_ms / 1000,
        on_query=on_query,
        require=False,
    )
    config = ConfigWatcher(
        path,
        snapshot,
        on_reload=partial(_applied, metrics),
        on_refused=partial(_refused, metrics),
    )
    metrics.config_applied(snapshot.digest)
    return Control(config, metrics, redis, database)


def create_app(control: Control) -> Starlette:
    """The ASGI application over an open `Control`, which stays the caller's to close."""
    return Starlette(
        routes=health.routes(
            {"redis": control.check_redis, "postgres": control.check_postgres},
            control.metrics.directory,
        ),
        exception_handlers={
            HTTPException: problems.on_http_exception,
            Exception: problems.on_unexpected,
        },
    )


def _applied(metrics: Metrics, old: Snapshot, new: Snapshot) -> None:
    metrics.config_applied(new.digest)
    logs.configure(new.settings.log.level, new.settings.log.format, "control")
    pending = restart_needed(old, new)
    _log.info("config_applied", digest=new.digest[:12], restart_needed=pending)


def _refused(metrics: Metrics, error: ConfigError) -> None:
    metrics.config_refused()
    _log.error("config_refused", source=error.source, problems=error.problems)
