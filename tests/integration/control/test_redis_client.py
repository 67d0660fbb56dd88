"""redis-py clients from each kind of URL."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster

from cli.embedded import EmbeddedValkey
from core.errors import StoreUnavailableError, TallygateError
from core.redis import client
from tests.support import free_port


async def _ping(url: str, timeout_s: float = 1.0) -> None:
    connection = client.connect(url, timeout_s)
    try:
        await client.ping(connection)
    finally:
        await connection.aclose()


def test_a_server_answers(any_redis_url: str) -> None:
    asyncio.run(_ping(any_redis_url))


def test_nobody_there_and_nobody_answering_are_the_same_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (free_port(), silent.getsockname()[1]):
            with pytest.raises(StoreUnavailableError, match="check that it runs"):
                asyncio.run(_ping(f"redis://:hunter2@127.0.0.1:{port}/0", 0.1))


def test_cluster_and_sentinel_urls() -> None:
    async def check() -> None:
        assert isinstance(client.connect("redis+cluster://127.0.0.1:1", 1), RedisCluster)
        master = client.connect("rediss+sentinel://u:p%40ss@a:1,b/main/3", 0.5)
        assert isinstance(master, Redis)
        pool = master.connection_pool
        assert pool.service_name == "main"
        hosts = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
        assert [(h["host"], h["port"]) for h in hosts] == [("a", 1), ("b", 26379)]
        wanted = {"db": 3, "username": "u", "password": "p@ss", "socket_timeout": 0.5}
        assert pool.connection_kwargs["retry"].get_retries() == 1  # on a connection found closed
        assert wanted.items() <= pool.connection_kwargs.items()

    asyncio.run(check())


@pytest.mark.parametrize("url", ["http://:hunter2@h", "hunter2", "redis+sentinel://:hunter2@h:1"])
def test_no_redis_url_is_an_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(TallygateError) as caught:
        client.connect(url, 1)
    assert "hunter2" not in str(caught.value)


def test_a_server_that_was_restarted_is_found_by_the_first_call(server_dir: Path) -> None:
    """On a connection that is in the pool, and that the server has closed meanwhile."""

    async def check(server: EmbeddedValkey) -> None:
        connection = client.connect(server.url, 5.0)
        try:
            for _ in range(2):
                await client.ping(connection)
                server.stop()
                server.restart()
                for _ in range(10):  # the loop looks at its sockets
                    await asyncio.sleep(0)
                await client.ping(connection)
        finally:
            await connection.aclose()

    with EmbeddedValkey(server_dir / "v", port=free_port()) as server:
        asyncio.run(check(server))
