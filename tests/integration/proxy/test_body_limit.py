"""A body without a length is cut where it goes over its route's limit."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.integration.proxy.conftest import GatewayFactory
from tests.integration.proxy.raw import Peer, answering, ok, on_loop

MOST = 200_000
FIRST = 150_000  # more than is read ahead: the upstream has had it when the rest is sent
CHUNKED = "Transfer-Encoding: chunked"


def chunk(size: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b"x" * size)


@pytest.mark.parametrize("begun", [False, True])
@on_loop
async def test_cut_on_its_way(begun: bool, gateway: GatewayFactory) -> None:
    """413 if nothing was answered, else the answer breaks off; the upstream sees no end."""
    half_there = asyncio.Event()
    rest: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.reader.readexactly(FIRST)
        if begun:
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab")
        half_there.set()
        rest.append(await peer.reader.read(-1))

    async with gateway(script, max_body=MOST) as relay, relay.client() as client:
        await client.send(client.head("POST /x", CHUNKED) + chunk(FIRST))
        await half_there.wait()
        if begun:
            assert (await client.answer_head()).status == 200
        await client.send(chunk(MOST - FIRST + 1))
        if begun:
            with contextlib.suppress(ConnectionError):
                assert await client.reader.read(-1) in (b"", b"ab"), "short of its length"
        else:
            answer = await client.answer()
            assert (answer.status, answer.clean) == (413, True)
        stats = await relay.quiet()
        assert stats["size"] == 0, "the connection is no good for another request"
        assert stats["outcomes"] == ({"broken": 1} if begun else {"content-too-large": 1})
    assert len(rest[0]) < MOST, "what went over was not sent"
    assert not rest[0].endswith(b"0\r\n\r\n")


@on_loop
async def test_cut_before_the_upstream_is_asked(gateway: GatewayFactory) -> None:
    async with gateway(answering(ok()), max_body=10) as relay:
        async with relay.client() as client:
            await client.send(client.head("POST /x", CHUNKED) + chunk(6) + chunk(5))
            assert (await client.answer()).status == 413
        assert relay.upstream.connections == 0
        async with relay.client() as client:
            await client.send(client.head("POST /x", CHUNKED) + chunk(6) + chunk(4) + b"0\r\n\r\n")
            assert (await client.answer()).status == 200
        assert (await relay.ask("POST /x", body=b"x" * 11)).status == 413
        assert (await relay.ask("POST /x", body=b"x" * 10)).status == 200
