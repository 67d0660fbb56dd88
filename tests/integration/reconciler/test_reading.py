"""Thousands of hashes in one go, on a connection of its own: errors, time-outs, coming back."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
import redis

from cli.embedded import EmbeddedValkey
from core.errors import StoreUnavailableError
from core.redis.store import Store
from tests.support import free_port


def test_in_order_with_gaps_and_any_text(valkey: str) -> None:
    async def main() -> None:
        store = Store.connect(valkey, 5)
        with redis.Redis.from_url(valkey) as client:
            for number in range(0, 2_500, 2):
                client.hset(f"k{number}", mapping={"n": number, "ümlaut": "a b"})
            keys = [f"k{number}" for number in range(2_500)]
            found = await store.hgetall_many(keys)
            assert [row.get("n") for row in found] == [
                None if number % 2 else str(number) for number in range(2_500)
            ]
            assert found[0]["ümlaut"] == "a b"
            assert await store.hgetall_many([]) == []
            # one that is no hash fails the call, and the replies behind it are not taken for others
            client.set("k1", "text")
            with pytest.raises(StoreUnavailableError, match="WRONGTYPE"):
                await store.hgetall_many(keys)
            assert (await store.hgetall_many(["k2"]))[0]["n"] == "2"
        await store.close()

    asyncio.run(main())


def test_a_server_that_stalls_or_dies_and_comes_back(server_dir: Path) -> None:
    async def main(server: EmbeddedValkey) -> None:
        errors: list[str] = []
        store = Store.connect(server.url, 0.3, errors.append)
        assert server.process is not None
        assert await store.hgetall_many(["a"]) == [{}]
        server.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailableError):
                await store.hgetall_many(["a", "b"])
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert errors == ["timeout"]
        server.kill()
        with pytest.raises(StoreUnavailableError):
            await store.hgetall_many(["a"])
        server.start()
        store_again = Store.connect(server.url, 5)
        both = await asyncio.gather(*(store_again.hgetall_many(["a"] * n) for n in (3, 2)))
        assert both == [[{}] * 3, [{}] * 2]
        await store.close()
        await store_again.close()

    with EmbeddedValkey(server_dir / "v", port=free_port()) as server:
        asyncio.run(main(server))
