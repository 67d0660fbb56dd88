"""A round of the reconciler: what fails in it does not take the rest with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from core.config import load
from core.errors import ConfigError, StoreUnavailableError
from core.meters import MeterRegistry
from core.policy import Meter
from reconciler.worker import Reconciler
from tests.integration.reconciler.parts import Parts, parts
from tests.integration.reconciler.test_flush import START_MS, spend
from tests.integration.reconciler.test_process import CONFIG
from tests.integration.reconciler.test_refused import EVENT
from tests.support.scripts import Scripts


@pytest.fixture
def reconciler(
    tmp_path: Path, valkey: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> Reconciler:
    monkeypatch.setenv("TALLYGATE_METRICS_DIR", str(tmp_path / "metrics"))
    monkeypatch.setattr("reconciler.worker._RETRY_S", 0)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    found = load(path, {"TALLYGATE_REDIS_URL": valkey, "TALLYGATE_POSTGRES_URL": database})
    return Reconciler(path, found)


def run(valkey: str, database: str, check: Any) -> None:
    async def main() -> None:
        async with parts(valkey, database) as p:
            await check(p)

    asyncio.run(main())


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), ValueError("a bug")])
def test_events_do_not_wait_for_counts(
    reconciler: Reconciler, valkey: str, database: str, error: Exception
) -> None:
    async def check(p: Parts) -> None:
        async def fails() -> Any:
            raise error

        p.flusher.flush_all = fails  # type: ignore[method-assign]
        await p.store._client.xadd(p.keyspace.events(0), EVENT)
        await reconciler._round(p.database, p.flusher, p.events)
        assert await p.store.entries(p.keyspace.events(0), 1) == []

    run(valkey, database, check)


def test_nothing_is_stored_before_the_meters_are_pinned(
    reconciler: Reconciler, valkey: str, database: str
) -> None:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    spend(scripts, "s", credits=5)

    async def check(p: Parts) -> None:
        fetch = p.database.transaction

        def away() -> Any:
            raise StoreUnavailableError("away")

        p.database.transaction = away  # type: ignore[method-assign]
        await reconciler._round(p.database, p.flusher, p.events)
        assert (await p.flusher.lag())[0] == 1
        p.database.transaction = fetch  # type: ignore[method-assign]
        await reconciler._round(p.database, p.flusher, p.events)
        assert (await p.flusher.lag())[0] == 0
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, check)


def test_other_decimals_than_the_ledgers_end_the_process(
    reconciler: Reconciler, valkey: str, database: str
) -> None:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    spend(scripts, "s", credits=5)

    async def check(p: Parts) -> None:
        await MeterRegistry({"credits": Meter("credits", decimals=5)}).pin(p.database)
        with pytest.raises(ConfigError, match="decimals: 2: pinned as 5"):
            await reconciler._round(p.database, p.flusher, p.events)
        assert (await p.flusher.lag())[0] == 1

    run(valkey, database, check)
