"""What passes through an uncounted WebSocket, by a client and an upstream of another maker."""

from __future__ import annotations

import asyncio
import json
import os

from websockets.asyncio.client import connect
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from tests.integration.websocket.upstream import Upstream
from tests.support.stack import Stack


def address(stack: Stack, path: str, **query: str) -> str:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"ws://127.0.0.1:{stack.ports[0]}{path}?{text}"


def test_messages_of_all_kinds_come_back_as_they_were_sent(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("open")
    shapes: list[str | bytes] = ["", "text", "ünïcode ✓", b"", b"\x00\xff" * 63, os.urandom(125)]
    shapes += [os.urandom(126), os.urandom(65_535), os.urandom(65_536), "x" * 200_000]

    async def run(compression: str | None) -> None:
        url = address(stack, "/live/echo")
        headers = {"x-api-key": who.key}
        async with connect(
            url, additional_headers=headers, compression=compression, max_size=None
        ) as client:
            for message in shapes:
                await client.send(message)
                assert await client.recv() == message
            await client.send(iter(["frag", "men", "", "ted"]))
            assert await client.recv() == "fragmented"
            big = os.urandom(5_000_000)
            await client.send(big)
            assert await client.recv() == big
            pong = await client.ping(b"are you there")
            await asyncio.wait_for(pong, 5)

    asyncio.run(run(None))
    asyncio.run(run("deflate"))
