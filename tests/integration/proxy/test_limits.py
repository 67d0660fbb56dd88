"""Time-outs, clients that go away, and back-pressure."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.integration.proxy.conftest import Gateway, GatewayFactory
from tests.integration.proxy.raw import Client, Peer, ok, on_loop, silent
from tests.support.wait import wait_until_async

MIB = 1024 * 1024
# What the relay may add while it passes a body on, whatever the body's size.
RSS_ALLOWED = 20 * MIB


@on_loop
async def test_a_silent_upstream_is_a_gateway_timeout(gateway: GatewayFactory) -> None:
    async with gateway(silent, response_ms=300) as relay:
        begun = time.monotonic()
        answer = await relay.ask("GET /x")
        elapsed = time.monotonic() - begun
        stats = await relay.quiet()
    assert answer.status == 504
    assert 0.3 <= elapsed < 2
    assert stats["size"] == 0


@on_loop
async def test_an_upstream_that_falls_silent_breaks_the_answer(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
        await peer.gone()

    async with gateway(script, response_ms=300) as relay:
        answer = await relay.ask("GET /x")
        stats = await relay.quiet()
    assert (answer.status, answer.clean) == (200, False)
    assert stats["outcomes"] == {"broken": 1}


@on_loop
async def test_a_slow_answer_in_pieces_is_no_timeout(gateway: GatewayFactory) -> None:
    """Each piece is a sign of life: the whole may last longer than the time-out."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100006\r\n\r\n" + b"x" * 100_000)
        for _ in range(6):
            await asyncio.sleep(0.15)  # the pace of this upstream, not a wait for something
            await peer.send(b"x")
        await peer.gone()

    async with gateway(script, response_ms=500) as relay:
        answer = await relay.ask("GET /x")
    assert answer.clean
    assert len(answer.body) == 100_006


@on_loop
async def test_a_small_answer_in_pieces_is_no_timeout_either(gateway: GatewayFactory) -> None:
    """Nor is its head held back until the last piece."""
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
        await go_on.wait()
        for _ in range(6):
            await asyncio.sleep(0.15)  # the pace of this upstream, not a wait for something
            await peer.send(b"x")
        await peer.gone()

    async with gateway(script, response_ms=500) as relay, relay.client() as client:
        await client.send(client.head("GET /x"))
        assert (await client.answer_head()).status == 200
        go_on.set()
        assert await client.reader.readexactly(6) == b"xxxxxx"
        stats = await relay.quiet()
    head_ms, upstream_ms = stats["last"]
    assert 0 < head_ms < 500
    assert upstream_ms > 900


@on_loop
async def test_a_small_answer_that_falls_silent_is_broken_off(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nxxx")
        await peer.gone()

    async with gateway(script, response_ms=300) as relay:
        answer = await relay.ask("GET /x")
        stats = await relay.quiet()
    assert (answer.status, answer.body, answer.clean) == (200, b"xxx", False)
    assert stats["outcomes"] == {"broken": 1}


@on_loop
async def test_the_time_to_the_head_of_a_whole_answer(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(0.2)  # the pace of this upstream
        await peer.send(ok())
        await peer.gone()

    async with gateway(script) as relay:
        await relay.ask("GET /x")
        head_ms, upstream_ms = (await relay.stats())["last"]
    assert 190 < head_ms <= upstream_ms


@on_loop
async def test_a_client_that_leaves_ends_a_slow_request(gateway: GatewayFactory) -> None:
    left: list[bool] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        left.append(await peer.gone())

    async with gateway(script) as relay:
        before = (await relay.stats())["outcomes"].get("client-disconnected", 0)
        async with relay.client() as client:
            await client.send(client.head("GET /x"))
            await relay.until(lambda s: s["in_use"] == 1, "in use")
        await wait_until_async(lambda: left, 5, "the upstream connection's end")
        stats = await relay.quiet()
    assert stats["outcomes"]["client-disconnected"] == before + 1
    assert stats["size"] == 0


@on_loop
async def test_a_client_that_leaves_ends_a_download(gateway: GatewayFactory) -> None:
    left: list[bool] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
        left.append(await peer.gone())

    async with gateway(script) as relay:
        async with relay.client() as client:
            await client.send(client.head("GET /x"))
            await client.answer_head()
        await wait_until_async(lambda: left, 5, "the upstream connection's end")
        stats = await relay.quiet()
    assert stats["outcomes"]["client_gone"] >= 1


@pytest.mark.parametrize("announced", [100, 10_000_000])
@on_loop
async def test_a_client_that_leaves_ends_an_upload(announced: int, gateway: GatewayFactory) -> None:
    async with gateway(silent) as relay:
        before = (await relay.stats())["outcomes"].get("client-disconnected", 0)
        async with relay.client() as client:
            await client.send(client.head("POST /x", length=announced) + b"x" * 50)
            await relay.until(lambda s: s["watched"] == 1, "in flight")
        stats = await relay.until(
            lambda s: s["outcomes"].get("client-disconnected", 0) > before, "disconnected"
        )
        await relay.quiet()
    assert stats["size"] == 0


async def flood(peer: Peer, size: int, sent: list[int]) -> None:
    """Answer with `size` bytes; `sent[0]` tells how many the gateway took so far."""
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
    block = b"x" * 262_144
    while sent[0] < size:
        await peer.send(block[: size - sent[0]])
        sent[0] += min(len(block), size - sent[0])
    await peer.gone()


@on_loop
async def test_a_slow_reader_holds_the_upstream_back(gateway: GatewayFactory) -> None:
    size = 256 * MIB
    sent = [0]

    async def script(peer: Peer) -> None:
        await flood(peer, size, sent)

    async with gateway(script) as relay, relay.client(receive_buffer=65536) as client:
        before = (await relay.stats())["rss"]
        await client.send(client.head("GET /x"))
        await client.answer_head()
        held = await stalled(relay, sent)
        assert held < 32 * MIB, "what sockets and buffers hold, not the body"
        assert (await relay.stats())["rss"] - before < RSS_ALLOWED
        await client.reader.readexactly(4 * MIB)
        await wait_until_async(lambda: sent[0] > held, 5, "more being taken")


async def stalled(relay: Gateway, sent: list[int]) -> int:
    """The upstream's progress once it has stopped: the same over twenty answers of the gateway."""
    same = 0
    last = -1
    while same < 20:
        await relay.stats()
        same = same + 1 if sent[0] == last else 0
        last = sent[0]
    return last


@on_loop
async def test_a_slow_upstream_holds_the_client_back(gateway: GatewayFactory) -> None:
    size = 128 * MIB
    sent = [0]
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await go_on.wait()
        left = size
        while left:
            left -= len(await peer.reader.read(MIB))
        await peer.send(ok(b"all of it"))
        await peer.gone()

    async def feed(client: Client) -> None:
        while sent[0] < size:
            await client.send(b"x" * 262_144)
            sent[0] += 262_144

    async with gateway(script) as relay, relay.client() as client:
        before = (await relay.stats())["rss"]
        await client.send(client.head("POST /x", length=size))
        feeding = asyncio.create_task(feed(client))
        held = await stalled(relay, sent)
        assert held < 32 * MIB
        assert (await relay.stats())["rss"] - before < RSS_ALLOWED
        go_on.set()
        await feeding
        assert (await client.answer()).body == b"all of it"


async def download(client: Client, size: int) -> None:
    await client.send(client.head("GET /x"))
    assert (await client.answer_head()).get("content-length") == [str(size)]
    left = size
    while left:
        data = await client.reader.read(MIB)
        assert data, f"ended {left} bytes early"
        left -= len(data)


async def upload(client: Client, size: int) -> None:
    await client.send(client.head("POST /x", length=size))
    block = b"x" * MIB
    for _ in range(size // MIB):
        await client.send(block)
    assert (await client.answer()).body == b"%d" % size


async def swallow(peer: Peer) -> None:
    request = await peer.head()
    length = int(request.get("content-length")[0])
    left = length
    while left:
        left -= len(await peer.reader.read(MIB))
    await peer.send(ok(b"%d" % length))
    await peer.gone()


async def peak_rss(relay: Gateway, done: asyncio.Task[None]) -> int:
    peak = 0
    while not done.done():
        peak = max(peak, (await relay.stats())["rss"])
        await asyncio.sleep(0.05)
    await done
    return peak


SIZES = [256 * MIB, pytest.param(1024 * MIB, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
@on_loop
async def test_a_large_download_costs_no_memory(size: int, gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await flood(peer, size, [0])

    async with gateway(script, response_ms=20_000) as relay, relay.client() as client:
        await relay.ask("GET /_stats")
        before = (await relay.stats())["rss"]
        peak = await peak_rss(relay, asyncio.create_task(download(client, size)))
    assert peak - before < RSS_ALLOWED


@pytest.mark.parametrize("size", SIZES)
@on_loop
async def test_a_large_upload_costs_no_memory(size: int, gateway: GatewayFactory) -> None:
    async with gateway(swallow, response_ms=20_000) as relay, relay.client() as client:
        before = (await relay.stats())["rss"]
        peak = await peak_rss(relay, asyncio.create_task(upload(client, size)))
    assert peak - before < RSS_ALLOWED
