"""What a worker weighs: cached keys, large bodies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.support.stack import PEPPER, Stack
from tests.support.wait import wait_until

KEYS = 100_000
MIB = 2**20

CONFIG = """
upstreams: {stub: {urls: ["http://127.0.0.1:9"]}}
routes: [{match: {path: "/*"}, upstream: stub}]
plans: {basic: {limits: {monthly: {period: billing, limit: 1_000}}}}
gateway: {key_cache: {size: 100_000}}
"""


def resident(pid: int) -> int:
    """Bytes of resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def store_keys(url: str) -> list[bytes]:
    """A key and a canceled subscription of its own, 100,000 times; returns the keys."""
    import asyncpg

    from core.secrets import KeyHasher, generate_key

    hasher = KeyHasher(PEPPER)
    now = datetime.now(UTC)
    keys = [generate_key().encode() for _ in range(KEYS)]
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "INSERT INTO creators (id, name, email) VALUES ('cr_1', 'c', 'c@example.com')"
        )
        await connection.execute(
            "INSERT INTO customers (id, creator_id, name, email) "
            "VALUES ('cus_1', 'cr_1', 'c', 'c@example.com')"
        )
        await connection.copy_records_to_table(
            "subscriptions",
            columns=["id", "creator_id", "customer_id", "plan", "status", "anchor"],
            records=[
                (f"sub_01J0000000000000000{number:07d}", "cr_1", "cus_1", "basic", "canceled", now)
                for number in range(KEYS)
            ],
        )
        await connection.copy_records_to_table(
            "api_keys",
            columns=["id", "subscription_id", "name", "prefix", "digest", "active"],
            records=[
                (
                    f"key_{number}",
                    f"sub_01J0000000000000000{number:07d}",
                    "k",
                    key[:12].decode(),
                    hasher.digest(key),
                    True,
                )
                for number, key in enumerate(keys)
            ],
        )
    finally:
        await connection.close()
    return keys


async def ask(port: int, keys: list[bytes], connections: int = 64) -> int:
    """One request a key; returns how many were answered 403."""

    async def one(mine: list[bytes]) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        refused = 0
        for key in mine:
            writer.write(b"GET / HTTP/1.1\r\nhost: t\r\nx-api-key: " + key + b"\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            start = head.index(b"content-length: ") + 16
            await reader.readexactly(int(head[start : head.index(b"\r\n", start)]))
            refused += head.startswith(b"HTTP/1.1 403")
        writer.close()
        return refused

    parts = [keys[number::connections] for number in range(connections)]
    return sum(await asyncio.gather(*map(one, parts)))


@pytest.mark.slow
def test_a_worker_with_100_000_cached_keys_stays_under_150_mib(
    own_stack: Callable[..., Stack],
) -> None:
    # canceled subscriptions: the key is looked up and cached, nothing is admitted
    stack = own_stack(CONFIG)
    keys = asyncio.run(store_keys(stack.env["TALLYGATE_POSTGRES_URL"]))
    assert asyncio.run(ask(stack.ports[0], keys)) == KEYS
    (worker,) = children(stack.gateways[0].pid)
    assert resident(worker) < 150 * MIB, f"{resident(worker) / MIB:.0f} MiB"
    # and they are cached: the second time none of them is looked up
    misses = "tallygate_key_cache_misses_total"
    wait_until(lambda: stack.metric(misses, kind="valid") == KEYS, what="all keys looked up once")
    assert asyncio.run(ask(stack.ports[0], keys[:1_000])) == 1_000
    hits = "tallygate_key_cache_hits_total"
    wait_until(lambda: stack.metric(hits, kind="valid") == 1_000, what="a thousand hits")
    assert stack.metric(misses, kind="valid") == KEYS
