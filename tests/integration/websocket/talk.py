"""A client of the gateway, and what the gateway says about it afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.stack import Stack, Subscriber
from tests.support.wait import wait_until

DEADLINE_S = 20


def address(port: int, path: str, query: Mapping[str, object]) -> str:
    """Of a path below a route."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"ws://127.0.0.1:{port}{path}?{text}"


@asynccontextmanager
async def opened(
    stack: Stack,
    path: str,
    caller: Subscriber | None = None,
    *,
    query: Mapping[str, object] | None = None,
    gateway: int = 0,
    **options: Any,
) -> AsyncIterator[ClientConnection]:
    """A WebSocket; the whole of it has `DEADLINE_S`. The upstream knows it by its caller's id."""
    headers = {"x-api-key": caller.key} if caller is not None else {}
    headers |= options.pop("headers", {})
    options = {"compression": None, "max_size": None, "ping_interval": None, **options}
    named = {"who": caller.id} if caller is not None else {}
    url = address(stack.ports[gateway], path, {**named, **(query or {})})
    async with (
        asyncio.timeout(DEADLINE_S),
        connect(url, additional_headers=headers, proxy=None, **options) as client,
    ):
        yield client


async def ended(client: ClientConnection) -> tuple[int, str]:
    """Reads to the end; how the connection was closed (1006: it was not)."""
    try:
        while True:
            await client.recv()
    except ConnectionClosed:
        return client.close_code or 0, client.close_reason or ""


def closed_line(stack: Stack, who: str, gateway: int = 0) -> dict[str, Any]:
    """What the log says of the one WebSocket of a subject that was closed."""
    found: list[dict[str, Any]] = []

    def logged() -> bool:
        found[:] = [
            line
            for text in stack.gateways[gateway].output.splitlines()
            if '"websocket_closed"' in text and (line := json.loads(text))["subject"] == who
        ]
        return bool(found)

    wait_until(logged, what=f"a line about the WebSocket of {who}")
    assert len(found) == 1, found
    return found[0]


def reconfigure(stack: Stack, text: str) -> None:
    """Another configuration, which is in force when this returns."""

    def applied() -> int:
        return stack.gateways[0].output.count('"config_applied"')

    before = applied()
    stack.write_config(text)
    wait_until(lambda: applied() > before, what="the configuration in force")


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A masked frame, of up to 65,535 bytes."""
    key, size = os.urandom(4), len(payload)
    head = bytes(((0x80 if fin else 0) | opcode,))
    head += bytes((0x80 | size,)) if size < 126 else b"\xfe" + struct.pack(">H", size)
    return head + key + bytes(byte ^ key[n % 4] for n, byte in enumerate(payload))


def handshake(
    path: str, key: str, *more: str, version: str = "13", upgrade: str = "websocket"
) -> bytes:
    """A request to open a WebSocket, as bytes."""
    lines = [
        f"GET {path} HTTP/1.1",
        "host: api.test",
        f"x-api-key: {key}",
        f"upgrade: {upgrade}",
        "connection: Upgrade",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        f"sec-websocket-version: {version}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


class Raw:
    """A connection of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body (by its length) of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(fields.get("content-length", 0)))
        return int(head[0].split(" ")[1]), fields, body

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame, which is not masked."""
        first, second = await self.reader.readexactly(2)
        size = second & 0x7F
        if size == 126:
            size = int.from_bytes(await self.reader.readexactly(2), "big")
        return first & 0x0F, await self.reader.readexactly(size)


@asynccontextmanager
async def raw(stack: Stack) -> AsyncIterator[Raw]:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.ports[0])
        try:
            yield Raw(reader, writer)
        finally:
            writer.transport.abort()
