"""Real servers for the tests: started once a session on free ports, emptied for each test.

Nothing of the application is imported before a fixture runs, so one broken module breaks its own
tests only.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.servers import NewDatabase, flush, redis_binaries, server_directory

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey

# Modules that assert for several tests: with the values in the message, as in a test.
pytest.register_assert_rewrite("tests.differential.differences", "tests.hardening.check")

_BINARIES = redis_binaries()
_TEMPLATE = "template_migrated"
_numbers = itertools.count(1)


@pytest.fixture
def server_dir() -> Iterator[Path]:
    """An empty directory for a server of the test's own: `EmbeddedValkey(server_dir / "a")`."""
    with server_directory() as path:
        yield path


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[dict[str, EmbeddedValkey]]:
    """Servers by name, each started when a test first asks; filled by the fixtures below."""
    started: dict[str, EmbeddedValkey] = {}
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session")
def _redis_home() -> Iterator[Path]:
    with server_directory() as path:
        yield path


def _redis_url(name: str, servers: dict[str, EmbeddedValkey], home: Path) -> str:
    from cli.embedded import EmbeddedValkey

    server = servers.get(name)
    if server is None:
        server = EmbeddedValkey(home / name, appendfsync="everysec", binary=_BINARIES[name])
        servers[name] = server.start()
    elif server.process is None or server.process.poll() is not None:
        server.start()  # a test crashed it: on the same data, a new port
        flush(server.url)
    else:
        flush(server.url)
    return server.url


@pytest.fixture
def valkey(redis_servers: dict[str, EmbeddedValkey], _redis_home: Path) -> str:
    """URL of an empty Valkey."""
    return _redis_url("valkey", redis_servers, _redis_home)


@pytest.fixture
def redis_server(redis_servers: dict[str, EmbeddedValkey], _redis_home: Path) -> str:
    """URL of an empty Redis 6.2, the oldest server supported."""
    return _redis_url("redis-6.2", redis_servers, _redis_home)


@pytest.fixture(params=list(_BINARIES))
def any_redis_url(
    request: pytest.FixtureRequest, redis_servers: dict[str, EmbeddedValkey], _redis_home: Path
) -> str:
    """URL of an empty server; the test runs once for each server there is on this machine."""
    return _redis_url(request.param, redis_servers, _redis_home)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """One Postgres a session, without fsync: a test that crashes Postgres starts its own."""
    from cli.embedded import EmbeddedPostgres

    with server_directory() as path:
        server = EmbeddedPostgres(path / "postgres", fast=True, config={"max_connections": "300"})
        with server:
            yield server


@pytest.fixture(scope="session")
def postgres_url(postgres_server: EmbeddedPostgres) -> str:
    """URL of the session's server; for a database to write to use `database`."""
    return postgres_server.url


@pytest.fixture
def empty_database(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """URL of a fresh database without any table; dropped afterwards."""
    yield from _fresh_database(postgres_server, "template1")


@pytest.fixture
def database(postgres_server: EmbeddedPostgres, _migrated: str) -> Iterator[str]:
    """URL of a fresh, migrated database; dropped afterwards, sessions and all."""
    yield from _fresh_database(postgres_server, _migrated)


@pytest.fixture(scope="session")
def _migrated(postgres_server: EmbeddedPostgres) -> str:
    """Migrating takes longer than copying a database: done once, copied by each test."""
    from core.db.migrate import migrate

    _execute(postgres_server.url, f"CREATE DATABASE {_TEMPLATE}")
    asyncio.run(migrate(postgres_server.url_of(_TEMPLATE)))
    return _TEMPLATE


@pytest.fixture(scope="session")
def new_database(postgres_server: EmbeddedPostgres, _migrated: str) -> NewDatabase:
    """Makes fresh, migrated databases that live as long as the session's server."""

    def make() -> str:
        name = f"kept_{os.getpid()}_{next(_numbers)}"
        _execute(
            postgres_server.url, f"CREATE DATABASE {name} TEMPLATE {_migrated} STRATEGY FILE_COPY"
        )
        return postgres_server.url_of(name)

    return make


def _fresh_database(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    _execute(server.url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield server.url_of(name)
    _execute(server.url, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, statement: str) -> None:
    import asyncpg

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())
