"""A gateway of one worker, Redis, Postgres and a WebSocket upstream; one for all tests here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.integration.websocket.catalogue import config
from tests.integration.websocket.upstream import Upstream
from tests.support.servers import server_directory
from tests.support.stack import Stack, start_stack

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="session")
def new_stack(
    postgres_server: EmbeddedPostgres, _migrated: str, upstream: Upstream
) -> Iterator[Callable[[str], Stack]]:
    """Starts a stack: `new_stack(name)`; all are stopped at the end of the session."""
    import asyncpg

    async def create(name: str) -> None:
        connection = await asyncpg.connect(postgres_server.url)
        try:
            await connection.execute(
                f"CREATE DATABASE {name} TEMPLATE {_migrated} STRATEGY FILE_COPY"
            )
        finally:
            await connection.close()

    with ExitStack() as stop:

        def start(name: str) -> Stack:
            asyncio.run(create(name))
            path = stop.enter_context(server_directory())
            return stop.enter_context(
                start_stack(
                    path, config(upstream.port, upstream.odd_port), postgres_server.url_of(name)
                )
            )

        yield start


@pytest.fixture(scope="session")
def stack(new_stack: Callable[[str], Stack]) -> Stack:
    return new_stack("websocket_shared")
