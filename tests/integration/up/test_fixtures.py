"""The shared fixtures do what their docstrings promise."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import redis


@pytest.mark.parametrize("_round", [1, 2])
def test_every_server_is_empty_and_writes_to_disk(any_redis_url: str, _round: int) -> None:
    with redis.Redis.from_url(any_redis_url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_the_named_servers_are_what_they_say(valkey: str, redis_server: str) -> None:
    with redis.Redis.from_url(valkey) as client:
        assert client.info("server")["server_name"] == "valkey"
    with redis.Redis.from_url(redis_server) as client:
        assert client.info("server")["redis_version"].startswith("6.2.")


@pytest.mark.parametrize("_round", [1, 2])
def test_every_test_has_a_database_of_its_own(empty_database: str, _round: int) -> None:
    async def tables() -> int:
        connection = await asyncpg.connect(empty_database)
        try:
            found = await connection.fetchval(
                "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
            )
            await connection.execute("CREATE TABLE left_behind (x int)")
            return int(found)
        finally:
            await connection.close()

    assert asyncio.run(tables()) == 0
