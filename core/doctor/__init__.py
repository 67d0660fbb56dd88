"""Is this deployment set up so that nothing can be lost? Settings of both stores, and the file.

`diagnose` reads; it changes nothing. What it says of a crash is about counts: a served request that
would not be billed, or one billed twice.
"""

from __future__ import annotations

from core.config import Snapshot
from core.db import connect_pool
from core.doctor import config, postgres, redis, tls
from core.doctor.findings import Crash, Diagnosis, Finding, Severity
from core.errors import StoreUnavailableError
from core.redis import survey
from core.redis.store import Store

__all__ = ["Crash", "Diagnosis", "Finding", "Severity", "diagnose"]


async def diagnose(
    snapshot: Snapshot, redis_url: str, postgres_url: str, *, timeout_s: float = 5.0
) -> Diagnosis:
    """Looks at Redis, Postgres and the configuration.

    A store that does not answer within `timeout_s` is a critical finding, not an error.

    Raises:
        TallygateError: a URL is none.
    """
    return Diagnosis(
        (
            *await _redis(snapshot, redis_url, timeout_s),
            *await _postgres(snapshot, postgres_url, timeout_s),
            *config.examine(snapshot),
            *tls.examine(snapshot),
        )
    )


async def _redis(snapshot: Snapshot, url: str, timeout_s: float) -> list[Finding]:
    store = Store.connect(url, timeout_s)
    try:
        info = await survey.info(store)
        settings = await survey.settings(store, redis.SETTINGS)
    except StoreUnavailableError as error:
        return [_unreachable("redis", "Redis", "every request is answered 503", error)]
    finally:
        await store.close()
    return redis.examine(info, settings, config.unflushed(snapshot))


async def _postgres(snapshot: Snapshot, url: str, timeout_s: float) -> list[Finding]:
    try:
        database = await connect_pool(url, size=1, timeout_s=timeout_s)
        try:
            return await postgres.examine(database, config.connections(snapshot))
        finally:
            await database.close()
    except StoreUnavailableError as error:
        effect = "nothing reaches the ledger; keys that are not cached are answered 503"
        return [_unreachable("postgres", "Postgres", effect, error)]


def _unreachable(area: str, name: str, effect: str, error: StoreUnavailableError) -> Finding:
    return Finding(
        f"{area}.reachable",
        Severity.CRITICAL,
        f"{name} could not be reached, so its settings are not known: {error}",
        {},
        f"start it, or correct {area}.url; while it is away {effect}",
    )
