"""Servers as they should be, and one that is not; started once a session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from tests.support.servers import redis_binaries, server_directory

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey


@pytest.fixture(scope="session")
def stop() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def home(stop: ExitStack) -> Path:
    return stop.enter_context(server_directory())


@pytest.fixture(scope="session")
def durable(stop: ExitStack, home: Path) -> EmbeddedValkey:
    """A Valkey as it should be."""
    from cli.embedded import EmbeddedValkey

    return stop.enter_context(EmbeddedValkey(home / "durable"))


@pytest.fixture(scope="session")
def old(stop: ExitStack, home: Path) -> EmbeddedValkey:
    """A Redis 6.2 that loses: no file, snapshots, a small memory that evicts."""
    from cli.embedded import EmbeddedValkey

    server = EmbeddedValkey(
        home / "old",
        binary=redis_binaries()["redis-6.2"],
        config={
            "appendonly": "no",
            "save": "3600 1",
            "maxmemory": "8mb",
            "maxmemory-policy": "allkeys-lru",
        },
    )
    return stop.enter_context(server)


@pytest.fixture(scope="session")
def ledger(stop: ExitStack, home: Path) -> EmbeddedPostgres:
    """A Postgres as it should be, up to date."""
    from cli.embedded import EmbeddedPostgres
    from core.db import migrate

    server = stop.enter_context(EmbeddedPostgres(home / "ledger"))
    asyncio.run(migrate(server.url))
    return server


@pytest.fixture
def client(durable: EmbeddedValkey) -> Iterator[redis.Redis[bytes]]:
    """The durable server; settings that the test changes are put back."""
    names = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "save",
             "no-appendfsync-on-rewrite", "min-replicas-to-write")  # fmt: skip
    with redis.Redis.from_url(durable.url) as connection:
        before = {name: value for n in names for name, value in connection.config_get(n).items()}
        yield connection
        for name, value in before.items():
            connection.config_set(name, value)
