"""Upstreams that break the protocol, die, or answer at the wrong time."""

from __future__ import annotations

import pytest

from gateway.proxy.body import INLINE_BODY
from tests.integration.proxy.conftest import GatewayFactory
from tests.integration.proxy.raw import Peer, Request, answering, ok, on_loop
from tests.support.wait import free_port, wait_until_async


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nxx",
        b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 103 Hint\r\n\r\n" * 20 + ok(),
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",  # and then the end
        b"HTTP/1.1 200 OK\r\nconte",
        b"HTTP/1.1 200 OK\r\nx-bad: a\x01b\r\ncontent-length: 2\r\n\r\nok",
    ],
)
@on_loop
async def test_an_unusable_answer_is_a_bad_gateway(answer: bytes, gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async with gateway(script) as relay:
        assert (await relay.ask("GET /x")).status == 502
        stats = await relay.quiet()
    assert stats["size"] == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
    ],
)
@on_loop
async def test_an_answer_cut_after_its_start_is_broken_off(
    answer: bytes, gateway: GatewayFactory
) -> None:
    """The client's connection ends without the end of the message: never a clean short answer."""
    go_on: list[Peer] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)
        go_on.append(peer)
        await peer.gone()

    async with gateway(script) as relay, relay.client() as client:
        await client.send(client.head("GET /x"))
        head = await client.answer_head()
        await client.reader.readexactly(3)
        go_on[0].writer.transport.abort()
        rest = await client.reader.read()

        assert head.status == 200
        assert not rest.endswith(b"0\r\n\r\n")
        assert len(rest) < 100_000
        stats = await relay.quiet()
    assert stats["outcomes"]["broken"] >= 1
    assert stats["size"] == 0


@pytest.mark.parametrize(
    "garbage", [b"x", b"HTTP/1.1 2", ok(b"evil"), b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"]
)
@on_loop
async def test_bytes_after_an_answer_never_reach_the_next_request(
    garbage: bytes, gateway: GatewayFactory
) -> None:
    async with gateway(answering(ok(b"good") + garbage)) as relay, relay.client() as client:
        first = await client.ask("GET /x")
        second = await client.ask("GET /x")
    assert [first.body, second.body] == [b"good", b"good"]
    assert relay.upstream.connections == 2


@on_loop
async def test_an_answer_while_idle_closes_the_connection(gateway: GatewayFactory) -> None:
    closed: list[bool] = []
    peers: list[Peer] = []

    async def script(peer: Peer) -> None:
        peers.append(peer)
        await peer.request()
        await peer.send(ok())
        closed.append(await peer.gone())

    async with gateway(script) as relay, relay.client() as client:
        assert (await client.ask("GET /x")).body == b"ok"
        await relay.until(lambda s: s["idle"] == 1, "idle")
        await peers[0].send(ok(b"evil"))
        await wait_until_async(lambda: closed, 5, "the connection's end")
        assert (await client.ask("GET /x")).body == b"ok"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"ok", "connection: close"),
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
@on_loop
async def test_the_upstream_may_decline_keep_alive(answer: bytes, gateway: GatewayFactory) -> None:
    async with gateway(answering(answer)) as relay, relay.client() as client:
        for _ in range(2):
            assert (await client.ask("GET /x")).body == b"ok"
    assert relay.upstream.connections == 2


@on_loop
async def test_a_stale_connection_is_replaced_unseen(gateway: GatewayFactory) -> None:
    """Every connection dies on its second request, before a byte of an answer."""
    seen: list[Request] = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.request())
        await peer.send(ok())
        seen.append(await peer.head())
        peer.writer.transport.abort()

    async with gateway(script) as relay, relay.client() as client:
        for method in ("GET", "GET", "PUT"):
            body = b"body" if method == "PUT" else b""
            assert (await client.ask(f"{method} /x", body=body)).status == 200
    # GET; GET dies, again on a new one; PUT dies there, again on the third, with its body.
    assert relay.upstream.connections == 3
    assert [request.body for request in seen][-1] == b"body"


@on_loop
async def test_a_post_is_never_sent_twice(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await peer.request()
        peer.writer.transport.abort()

    async with gateway(script) as relay, relay.client() as client:
        await client.ask("GET /x")
        answer = await client.ask("POST /x", body=b"pay")
    assert answer.status == 502
    assert relay.upstream.connections == 1


@on_loop
async def test_a_first_connection_that_dies_is_not_retried(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    async with gateway(script) as relay:
        assert (await relay.ask("GET /x")).status == 502
    assert relay.upstream.connections == 1


@on_loop
async def test_an_early_answer_stops_the_upload(gateway: GatewayFactory) -> None:
    closed = []

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        closed.append(await peer.gone())

    async with gateway(script) as relay, relay.client() as client:
        await client.send(client.head("POST /x", length=10_000_000))
        await client.send(b"x" * 100_000)
        answer = await client.answer()
        assert (answer.status, answer.body) == (413, b"big")
        stats = await relay.quiet()
        assert stats["size"] == 0
    assert closed == [True]


@on_loop
async def test_an_answer_may_stream_while_the_body_is_sent(gateway: GatewayFactory) -> None:
    """From `INLINE_BODY` bytes on: the upstream sees nothing of a body that is shorter so far."""
    first = b"x" * INLINE_BODY

    async def script(peer: Peer) -> None:
        await peer.head()
        size = int(await peer.reader.readuntil(b"\r\n"), 16)
        assert await peer.reader.readexactly(size + 2) == first + b"\r\n"
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            size = int(await peer.reader.readuntil(b"\r\n"), 16)
            data = await peer.reader.readexactly(size + 2)
            await peer.send(b"%x\r\n%b" % (size, data))
        await peer.reader.readuntil(b"0\r\n\r\n")
        await peer.send(b"0\r\n\r\n")
        await peer.gone()

    async with gateway(script) as relay, relay.client() as client:
        await client.send(client.head("POST /x", "Transfer-Encoding: chunked"))
        await client.send(b"%x\r\n%b\r\n" % (len(first), first))
        assert (await client.answer_head()).status == 200
        chunks = client.chunks()
        for piece in (b"one", b"two", b"three"):
            await client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            assert await anext(chunks) == piece
        await client.send(b"0\r\n\r\n")
        assert [chunk async for chunk in chunks] == []
        stats = await relay.quiet()
        assert stats["idle"] == 1


@on_loop
async def test_nobody_listens(gateway: GatewayFactory) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    async with gateway(answering(ok()), nobody) as relay:
        assert (await relay.ask("GET /x")).status == 502
        stats = await relay.quiet()
    assert stats["failures"] == 1
    assert stats["size"] == 0
