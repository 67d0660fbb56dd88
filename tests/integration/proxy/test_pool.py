"""Upstream connections: how many there are, who gets one, and when."""

from __future__ import annotations

import asyncio
import socket

import pytest

from gateway.proxy import watch
from tests.integration.proxy.conftest import GatewayFactory
from tests.integration.proxy.raw import Client, Peer, answering, ok, on_loop, silent


@on_loop
async def test_connecting_times_out(gateway: GatewayFactory) -> None:
    """A full accept queue: the connection is neither refused nor made."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        async with gateway(
            answering(ok()), f"http://127.0.0.1:{address[1]}", connect_ms=200
        ) as relay:
            answer = await relay.ask("GET /x")
            stats = await relay.quiet()
        for filler in fillers:
            filler.close()
    assert answer.status == 504
    assert (stats["size"], stats["failures"]) == (0, 1)


@on_loop
async def test_the_pool_is_bounded_and_queues(gateway: GatewayFactory) -> None:
    open_now = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await open_now.wait()
            await peer.send(ok())

    async with gateway(script, max_connections=2, connect_ms=5000) as relay:
        asked = [asyncio.create_task(relay.ask("GET /x")) for _ in range(6)]
        await relay.until(lambda s: s["watched"] == 6, "six in flight")
        assert (await relay.stats())["size"] == 2
        open_now.set()
        assert {answer.status for answer in await asyncio.gather(*asked)} == {200}
        stats = await relay.quiet()
    assert relay.upstream.connections == 2
    assert (stats["opened"], stats["idle"], stats["size"]) == (2, 2, 2)


@on_loop
async def test_a_full_pool_refuses_after_the_connect_timeout(gateway: GatewayFactory) -> None:
    async with gateway(silent, max_connections=1, connect_ms=200) as relay:
        async with relay.client() as first:
            await first.send(first.head("GET /x"))
            await relay.until(lambda s: s["in_use"] == 1, "in use")
            assert (await relay.ask("GET /y")).status == 503
        await relay.quiet()


@pytest.mark.parametrize(
    "started",
    [
        Client.head("POST /x", "Transfer-Encoding: chunked"),
        Client.head("POST /x", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n",
        Client.head("POST /x", length=10),
        Client.head("POST /x", length=10_000_000) + b"x" * 1000,
    ],
)
@on_loop
async def test_an_upload_that_stalls_holds_no_connection(
    started: bytes, gateway: GatewayFactory
) -> None:
    async with gateway(answering(ok()), max_connections=1, connect_ms=200) as relay:
        async with relay.client() as stalled, relay.client() as other:
            await stalled.send(started)
            await relay.until(lambda s: s["watched"] == 1, "in flight")
            assert (await other.ask("GET /y")).status == 200
            assert (await relay.stats())["in_use"] == 0
        await relay.quiet()


@on_loop
async def test_an_upload_that_waits_for_a_connection_arrives_whole(gateway: GatewayFactory) -> None:
    """The watch asks after clients that wait this long; it must not take their body's pieces."""
    go_on = asyncio.Event()
    bodies: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            bodies.append((await peer.request()).body)
            await go_on.wait()
            await peer.send(ok())

    body = bytes(range(256)) * 4096
    async with gateway(script, max_connections=1, connect_ms=5000) as relay:
        first = asyncio.create_task(relay.ask("GET /x"))
        await relay.until(lambda s: s["in_use"] == 1, "in use")
        second = asyncio.create_task(relay.ask("PUT /x", body=body))
        await relay.until(lambda s: s["watched"] == 2, "in flight")
        await asyncio.sleep((watch.ARM_AFTER + 2) * watch.TICK_S)
        go_on.set()
        assert [(await first).status, (await second).status] == [200, 200]
    assert bodies == [b"", body]


@on_loop
async def test_idle_connections_expire(gateway: GatewayFactory) -> None:
    async with gateway(answering(ok()), keepalive_ms=200) as relay:
        assert (await relay.ask("GET /x")).status == 200
        await relay.until(lambda s: s["size"] == 0, "expired")


@on_loop
async def test_urls_take_turns(gateway: GatewayFactory) -> None:
    async with gateway(answering(ok())) as relay:
        one = relay.upstream.url
        two = one.replace("127.0.0.1", "localhost")
        hosts = []

        async def script(peer: Peer) -> None:
            while True:
                hosts.append((await peer.request()).get("host")[0].split(":")[0])
                await peer.send(ok())

        relay.upstream.script = script
        async with gateway(script, one, two) as both:
            for _ in range(4):
                assert (await both.ask("GET /x")).status == 200
        assert sorted(hosts) == ["127.0.0.1"] * 2 + ["localhost"] * 2
