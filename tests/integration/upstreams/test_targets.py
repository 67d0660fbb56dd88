"""Several targets: health checks, ejection, DNS, balancing, and connections that grow old."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from core.upstream import Balance, Ejection, HealthCheck
from gateway.proxy.pool import UpstreamPool
from tests.integration.proxy.raw import on_loop
from tests.integration.upstreams.support import Switch, ask, dead_port, pool_of, serving
from tests.support.wait import free_port, wait_until_async


def out(pool: UpstreamPool) -> list[int]:
    return [index for index, endpoint in enumerate(pool.endpoints) if not endpoint.usable]


async def load(pool: UpstreamPool, clients: int, until: asyncio.Event) -> Counter[int | str]:
    """So many clients, one request after the other, until the event; results by status."""
    results: Counter[int | str] = Counter()

    async def client() -> None:
        while not until.is_set():
            results[(await ask(pool))[0]] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return results


CHECK = HealthCheck(
    "/healthz", frozenset(range(200, 300)), interval_ms=30, timeout_ms=20_000, unhealthy_after=2
)


@on_loop
async def test_an_unhealthy_target_leaves_and_returns_under_load_without_a_failure() -> None:
    good, bad = Switch("good"), Switch("bad")
    async with (
        serving(good) as one,
        serving(bad) as two,
        pool_of(one.url, two.url, health=CHECK) as pool,
    ):
        stop = asyncio.Event()
        running = asyncio.create_task(load(pool, 4, stop))
        await wait_until_async(lambda: bad.count() > 5, what="both are used")
        bad.mode = "404"  # no failure of a gateway: only the checks decide
        await wait_until_async(lambda: out(pool) == [1], what="out")
        await wait_until_async(lambda: pool.in_use <= 4, what="settled")
        served = bad.count()
        goods = good.count()
        await wait_until_async(lambda: good.count() > goods + 50, what="the other serves")
        assert bad.count() <= served + 4, "only what was under way"
        bad.mode = "ok"
        await wait_until_async(lambda: out(pool) == [], what="back")
        served = bad.count()
        await wait_until_async(lambda: bad.count() > served + 5, what="used again")
        stop.set()
        results = await running
    assert set(results) == {200, 404}
    assert bad.count("/healthz") >= 4


@on_loop
async def test_when_all_are_unhealthy_all_are_tried() -> None:
    switch = Switch()
    switch.mode = "503"
    async with (
        serving(switch) as one,
        pool_of(one.url, f"http://127.0.0.1:{dead_port()}", health=CHECK) as pool,
    ):
        await wait_until_async(lambda: out(pool) == [0, 1], what="all out")
        switch.mode = "ok"
        assert await ask(pool) == (200, b"ok")


@on_loop
async def test_a_target_that_fails_is_ejected_under_load_and_recovers() -> None:
    good, bad = Switch("good"), Switch("bad")
    bad.mode = "reset"
    # Long enough to see it out even on a slow machine, short enough to see it back.
    rule = Ejection(failures=3, for_ms=1_500, max_ms=1_500)
    async with (
        serving(good) as one,
        serving(bad) as two,
        pool_of(one.url, two.url, eject=rule) as pool,
    ):
        stop = asyncio.Event()
        running = asyncio.create_task(load(pool, 4, stop))
        await wait_until_async(lambda: pool.endpoints[1].ejections > 0, what="ejected")
        bad.mode = "ok"
        await wait_until_async(lambda: out(pool) == [], what="back")
        served = bad.count()
        await wait_until_async(lambda: bad.count() > served + 10, what="used again")
        stop.set()
        results = await running
        assert not pool.endpoints[1].probation
        ejections = pool.endpoints[1].ejections
    # Three in a row, and what was under way to it on other connections.
    assert 3 <= results["upstream-closed"] <= 3 + 4 * max(ejections, 1)
    assert set(results) == {200, "upstream-closed"}


@on_loop
async def test_connections_refused_eject_too_and_no_request_notices() -> None:
    good = Switch()
    rule = Ejection(failures=2, for_ms=60_000, max_ms=60_000)
    async with (
        serving(good) as one,
        pool_of(f"http://127.0.0.1:{dead_port()}", one.url, eject=rule) as pool,
    ):
        for _ in range(20):
            assert await ask(pool, "POST", body=b"x") == (200, b"ok")
        assert out(pool) == [0]
        assert pool.failures == 2


@on_loop
async def test_an_answer_that_breaks_off_is_a_failure() -> None:
    async def half(peer: object) -> None:
        await peer.request()  # type: ignore[attr-defined]
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nx")  # type: ignore[attr-defined]

    good = Switch()
    rule = Ejection(failures=2, for_ms=60_000, max_ms=60_000)
    async with (
        serving(half) as one,
        serving(good) as two,
        pool_of(one.url, two.url, eject=rule) as pool,
    ):
        results = Counter([(await ask(pool))[0] for _ in range(20)])
        assert out(pool) == [0]
    assert results == {"upstream-closed": 2, 200: 18}


class Names:
    """A resolver: a function whose answers a test changes."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] = addresses
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        assert host == "api.test"
        self.asked += 1
        if not self.addresses:
            raise OSError("no such name")
        return self.addresses


@on_loop
async def test_every_address_of_a_name_is_a_target_and_changes_are_followed() -> None:
    port = free_port()
    first, second, third = Switch("1"), Switch("2"), Switch("3")
    names = Names("127.0.0.1", "127.0.0.2")
    async with (
        serving(first, host="127.0.0.1", port=port),
        serving(second, host="127.0.0.2", port=port),
        serving(third, host="127.0.0.3", port=port),
        pool_of(f"http://api.test:{port}", resolver=names, dns_refresh_ms=30) as pool,
    ):
        await wait_until_async(lambda: len(pool.endpoints) == 2, what="resolved")
        answers = Counter([(await ask(pool))[1] for _ in range(10)])
        assert answers == {b"1": 5, b"2": 5}
        kept = pool.endpoints[1]
        assert kept.target.authority == b"api.test:%d" % port
        names.addresses = ["127.0.0.3", "127.0.0.2"]
        await wait_until_async(
            lambda: {e.target.host for e in pool.endpoints} == {"127.0.0.2", "127.0.0.3"},
            what="changed",
        )
        assert kept in pool.endpoints
        assert pool.idle == 1, "the connection that stays; the other was closed"
        answers = Counter([(await ask(pool))[1] for _ in range(10)])
        assert answers == {b"2": 5, b"3": 5}
        names.addresses = []
        asked = names.asked
        await wait_until_async(lambda: names.asked > asked + 2, what="look-ups failed")
        assert len(pool.endpoints) == 2
        assert {(await ask(pool))[1] for _ in range(4)} == {b"2", b"3"}
        names.addresses = ["127.0.0.1"]
        await wait_until_async(lambda: len(pool.endpoints) == 1, what="resolved again")
        assert await ask(pool) == (200, b"1")


@on_loop
async def test_a_request_under_way_outlives_its_address() -> None:
    port = free_port()
    go_on = asyncio.Event()

    async def slow(peer: object) -> None:
        await peer.request()  # type: ignore[attr-defined]
        await go_on.wait()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nold")  # type: ignore[attr-defined]

    names = Names("127.0.0.1")
    async with (
        serving(slow, host="127.0.0.1", port=port),
        serving(Switch("new"), host="127.0.0.2", port=port),
        pool_of(f"http://api.test:{port}", resolver=names, dns_refresh_ms=30) as pool,
    ):
        await wait_until_async(
            lambda: pool.endpoints[0].target.host == "127.0.0.1", what="resolved"
        )
        asked = asyncio.create_task(ask(pool))
        await wait_until_async(lambda: pool.in_use == 1, what="under way")
        names.addresses = ["127.0.0.2"]
        await wait_until_async(lambda: pool.endpoints[0].target.host == "127.0.0.2", what="changed")
        assert await ask(pool) == (200, b"new")
        go_on.set()
        assert await asked == (200, b"old")
        assert pool.size == 1, "its connection was not kept"


@on_loop
async def test_a_name_that_was_never_resolved_is_left_to_each_connection() -> None:
    async def nobody(host: str, port: int) -> Sequence[str]:
        raise OSError("no resolver")

    async with (
        serving(Switch()) as one,
        pool_of(f"http://localhost:{one.port}", resolver=nobody, dns_refresh_ms=30) as pool,
    ):
        assert await ask(pool) == (200, b"ok")


@pytest.mark.parametrize(
    ("balance", "weights", "shares"),
    [
        (Balance.ROUND_ROBIN, (3, 1), {b"one": 15, b"two": 5}),
        (Balance.LEAST_CONNECTIONS, (), {b"one": 10, b"two": 10}),
    ],
)
@on_loop
async def test_requests_are_spread(
    balance: Balance, weights: tuple[int, ...], shares: dict[bytes, int]
) -> None:
    async with (
        serving(Switch("one")) as one,
        serving(Switch("two")) as two,
        pool_of(one.url, two.url, balance=balance, weights=weights) as pool,
    ):
        assert Counter([(await ask(pool))[1] for _ in range(20)]) == shares


@on_loop
async def test_a_key_keeps_its_target_also_when_all_connections_are_taken() -> None:
    async with (
        serving(Switch("one")) as one,
        serving(Switch("two")) as two,
        pool_of(
            one.url, two.url, balance=Balance.HASH, hash_by="x-session", max_connections=1,
            connect_timeout_ms=20_000,
        ) as pool,
    ):  # fmt: skip
        keys = [b"%d" % number for number in range(20)]
        owners = {key: (await ask(pool, key=key))[1] for key in keys}
        assert set(owners.values()) == {b"one", b"two"}
        answers = await asyncio.gather(*(ask(pool, key=key) for key in keys))
        assert [body for _, body in answers] == [owners[key] for key in keys]
        assert pool.size == 1


@on_loop
async def test_connections_are_replaced_when_they_are_old() -> None:
    async with (
        serving(Switch()) as one,
        pool_of(one.url, lifetime_ms=100) as pool,
    ):
        await ask(pool)
        assert pool.size == 1
        await wait_until_async(lambda: pool.size == 0, what="closed when idle")
        stop = asyncio.Event()
        running = asyncio.create_task(load(pool, 1, stop))
        await wait_until_async(lambda: pool.opened >= 4, what="replaced while in use")
        stop.set()
        assert set(await running) == {200}
