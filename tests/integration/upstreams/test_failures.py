"""Retries, the breaker, time-outs and the wait queue, over real sockets."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from core.upstream import Breaker, Retries
from gateway.proxy.errors import BreakerOpen, QueueFull
from tests.integration.proxy.raw import Peer, Request, answering, ok, on_loop, silent
from tests.integration.upstreams.support import Switch, ask, dead_port, pool_of, serving
from tests.support.wait import wait_until_async

FIRST = b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\nno"
# Hundredths of a second pass between tries, not more.
QUICK = Retries(attempts=3, backoff_ms=1, floor=1_000)


def failing_once(answer: bytes | None, then: bytes, seen: list[Request]):  # type: ignore[no-untyped-def]
    """A script: the first request of all gets `answer`, None a reset; the others get `then`."""

    async def script(peer: Peer) -> None:
        while True:
            request = await peer.request()
            seen.append(request)
            if len(seen) > 1:
                await peer.send(then)
            elif answer is None:
                peer.writer.transport.abort()
                return
            else:
                await peer.send(answer)

    return script


@pytest.mark.parametrize("answer", [FIRST, None], ids=["503", "reset"])
@on_loop
async def test_an_idempotent_request_is_tried_again_and_charged_once(answer: bytes | None) -> None:
    seen: list[Request] = []
    charged: list[int] = []

    async def charge(status: int) -> None:
        charged.append(status)

    async with (
        serving(failing_once(answer, ok(), seen)) as one,
        pool_of(one.url, retries=QUICK) as pool,
    ):
        assert await ask(pool, "PUT", body=b"abc", before_start=charge) == (200, b"ok")
    assert [request.body for request in seen] == [b"abc", b"abc"]
    assert charged == [200]


@pytest.mark.parametrize(
    ("answer", "result"), [(FIRST, (503, b"no")), (None, ("upstream-closed", b""))]
)
@on_loop
async def test_what_is_not_idempotent_is_not(
    answer: bytes | None, result: tuple[int | str, bytes]
) -> None:
    seen: list[Request] = []
    async with (
        serving(failing_once(answer, ok(), seen)) as one,
        pool_of(one.url, retries=QUICK) as pool,
    ):
        assert await ask(pool, "POST", body=b"abc") == result
    assert len(seen) == 1


@on_loop
async def test_another_target_is_tried_first() -> None:
    bad, good = Switch("bad"), Switch("good")
    bad.mode = "502"
    async with (
        serving(bad) as one,
        serving(good) as two,
        pool_of(one.url, two.url, retries=QUICK) as pool,
    ):
        assert {await ask(pool) for _ in range(20)} == {(200, b"good")}
    assert bad.count() == 10


@on_loop
async def test_a_connection_refused_is_tried_again_whatever_the_method() -> None:
    port = dead_port()
    causes: list[str] = []
    rule = Retries(attempts=10, backoff_ms=200, floor=1_000)
    async with pool_of(f"http://127.0.0.1:{port}", retries=rule) as pool:
        assert pool.retries is not None
        pool.retries.on_retry = causes.append
        asked = asyncio.create_task(ask(pool, "POST", body=b"x"))
        await wait_until_async(lambda: causes, what="a retry")
        async with serving(Switch(), port=port):
            assert await asked == (200, b"ok")
    assert set(causes) == {"connect"}


@on_loop
async def test_the_last_answer_is_passed_on_as_it_is() -> None:
    switch = Switch()
    switch.mode = "503"
    async with serving(switch) as one, pool_of(one.url, retries=QUICK) as pool:
        assert await ask(pool) == (503, b"no")
    assert switch.count() == 3


@on_loop
async def test_the_budget_bounds_what_an_upstream_that_is_down_gets() -> None:
    switch = Switch()
    switch.mode = "503"
    rule = Retries(attempts=10, percent=20, floor=0, backoff_ms=1)
    causes: Counter[str] = Counter()
    async with serving(switch) as one, pool_of(one.url, retries=rule) as pool:
        assert pool.retries is not None
        pool.retries.on_retry = lambda cause: causes.update([cause])
        for _ in range(100):
            assert (await ask(pool))[0] == 503
    assert switch.count() == 120
    assert causes == {"status": 20, "budget": 100}


@on_loop
async def test_a_try_that_takes_too_long_is_followed_by_another() -> None:
    seen = 0

    async def script(peer: Peer) -> None:
        nonlocal seen
        while True:
            await peer.request()
            seen += 1
            if seen == 1:
                await peer.gone(30)
                return
            await peer.send(ok())

    rule = Retries(attempts=5, backoff_ms=1, floor=10, per_try_ms=200)
    async with serving(script) as one, pool_of(one.url, retries=rule) as pool:
        assert await ask(pool) == (200, b"ok")
        seen = 0
        assert (await ask(pool, "POST", body=b"x"))[0] == "upstream-timeout"


@on_loop
async def test_the_total_bounds_all_tries_together() -> None:
    rule = Retries(attempts=10, backoff_ms=1, floor=1_000, per_try_ms=100)
    async with (
        serving(silent) as one,
        pool_of(one.url, retries=rule, total_timeout_ms=1_000) as pool,
    ):
        assert (await ask(pool))[0] == "upstream-total-timeout"
    assert 1 < one.connections < 10


@on_loop
async def test_the_total_bounds_an_answer_that_never_ends() -> None:
    async def trickle(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while not peer.writer.is_closing():
            await peer.send(b"x")
            await asyncio.sleep(0.02)

    async with serving(trickle) as one, pool_of(one.url, total_timeout_ms=300) as pool:
        assert (await ask(pool))[0] == "upstream-total-timeout"


@on_loop
async def test_the_idle_time_out_is_between_pieces() -> None:
    async def stops(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\nx")
        await peer.gone(30)

    async with serving(stops) as one, pool_of(one.url, idle_timeout_ms=100) as pool:
        assert (await ask(pool))[0] == "upstream-idle-timeout"


@pytest.mark.parametrize("retries", [None, QUICK])
@on_loop
async def test_a_stale_connection_is_replaced_only_where_that_is_safe(
    retries: Retries | None,
) -> None:
    """The upstream closes a kept connection in the moment in which the next request is sent."""
    seen: list[Request] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(ok())
        seen.append(await peer.request())
        peer.writer.transport.abort()

    rule = None if retries is None else Retries(attempts=2, causes=frozenset(), floor=10)
    async with serving(script) as one, pool_of(one.url, retries=rule) as pool:
        for _ in range(2):
            assert await ask(pool) == (200, b"ok")
        assert (await ask(pool, "POST", body=b"x"))[0] == "upstream-closed"
    assert [request.method for request in seen] == ["GET", "GET", "GET", "POST"]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@on_loop
async def test_the_breaker_spares_an_upstream_that_is_down() -> None:
    switch, clock = Switch(), Clock()
    switch.mode = "503"
    rule = Breaker(errors=50, minimum=10, open_ms=5_000, probes=2)
    async with serving(switch) as one, pool_of(one.url, breaker=rule, now=clock) as pool:
        results = Counter([(await ask(pool))[0] for _ in range(50)])
        assert results == {503: 10, "upstream-resting": 40}
        assert switch.count() == 10
        assert pool.refusing is not None
        with pytest.raises(BreakerOpen) as caught:
            pool.refusing()
        assert caught.value.retry_after_s == pytest.approx(5)
        clock.now += 5
        assert (await ask(pool))[0] == 503, "a probe"
        assert (await ask(pool))[0] == "upstream-resting"
        switch.mode = "ok"
        clock.now += 5
        assert {(await ask(pool))[0] for _ in range(20)} == {200}
        pool.refusing()
        assert pool.refusing is None, "asked no more"


@on_loop
async def test_no_retry_takes_a_probes_place() -> None:
    switch, clock = Switch(), Clock()
    switch.mode = "503"
    rule = Breaker(errors=50, minimum=10, open_ms=5_000, probes=2)
    retries = Retries(attempts=10, backoff_ms=1, floor=1_000)
    async with (
        serving(switch) as one,
        pool_of(one.url, breaker=rule, retries=retries, now=clock) as pool,
    ):
        assert await ask(pool) == (503, b"no")
        assert switch.count() == 10, "the tenth opened it"
        clock.now += 5
        assert await ask(pool) == (503, b"no")
        assert switch.count() == 11


@on_loop
async def test_the_wait_queue_is_bounded() -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await go_on.wait()
            await peer.send(ok())

    async with (
        serving(script) as one,
        pool_of(one.url, max_connections=2, max_waiting=3, connect_timeout_ms=20_000) as pool,
    ):
        asked = [asyncio.create_task(ask(pool)) for _ in range(5)]
        await wait_until_async(lambda: pool.waiting == 3, what="a full queue")
        assert pool.refusing is not None
        with pytest.raises(QueueFull):
            pool.refusing()
        assert (await ask(pool))[0] == "upstream-queue-full"
        go_on.set()
        assert set(await asyncio.gather(*asked)) == {(200, b"ok")}
        pool.refusing()
        assert pool.refusing is None
        assert (pool.opened, pool.size) == (2, 2)


@on_loop
async def test_nobody_waits_where_nobody_may() -> None:
    async with (
        serving(silent) as one,
        pool_of(one.url, max_connections=1, max_waiting=0, response_timeout_ms=300) as pool,
    ):
        first = asyncio.create_task(ask(pool))
        await wait_until_async(lambda: pool.in_use == 1, what="taken")
        assert (await ask(pool))[0] == "upstream-queue-full"
        assert (await first)[0] == "upstream-timeout"
        pool.refusing and pool.refusing()


@on_loop
async def test_a_plain_upstream_keeps_its_fast_path() -> None:
    async with serving(answering(ok())) as one:
        async with pool_of(one.url, lifetime_ms=60_000, total_timeout_ms=60_000) as pool:
            await ask(pool)
            conn = pool.get_idle()
            assert conn is not None
            pool.release(conn)
            assert not pool.guarded
        async with pool_of(one.url, retries=QUICK) as pool:
            await ask(pool)
            assert pool.get_idle() is None, "each try is asked for"
