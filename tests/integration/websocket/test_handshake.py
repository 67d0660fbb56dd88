"""Which requests open a WebSocket; what becomes of those that nearly do, byte by byte."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.exceptions import InvalidStatus

from tests.integration.websocket.talk import frame, opened, raw
from tests.integration.websocket.talk import handshake as asking
from tests.integration.websocket.upstream import Upstream
from tests.support.stack import Stack

PLAIN = b"GET /off/secret HTTP/1.1\r\nhost: a\r\nx-api-key: %b\r\n\r\n"

BAD = {
    "an old version": ({"version": "8"}, (), 426),
    "two versions": ({}, ("sec-websocket-version: 13",), 426),
    "two keys": ({}, ("sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",), 400),
    "a body": ({}, ("content-length: 5",), 400),
    "a chunked body": ({}, ("transfer-encoding: chunked",), 400),
}


@pytest.mark.parametrize("name", BAD)
def test_a_handshake_that_is_not_well_formed_is_refused_and_costs_nothing(
    stack: Stack, upstream: Upstream, name: str
) -> None:
    who = stack.subscribe("open")
    options, more, expected = BAD[name]
    body = {"a body": b"hello", "a chunked body": b"5\r\nhello\r\n0\r\n\r\n"}.get(name, b"")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking("/live/echo", who.key, *more, **options) + body)
            status, fields, text = await client.answer()
            assert status == expected
            if status == 426:
                assert fields["sec-websocket-version"] == "13"
            assert json.loads(text)["status"] == expected
            # The connection goes on, at the right byte.
            client.writer.write(PLAIN % who.key.encode())
            assert (await client.answer())[0] == 200

    asyncio.run(run())
    assert int(stack.state(who)["requests"].total) == 1


@pytest.mark.parametrize("key", ["", "c2hvcnQ=", "not base64, at all !!!!==", "x" * 24])
def test_a_key_is_sixteen_bytes(stack: Stack, key: str) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            sent = asking("/live/echo", who.key).replace(b"dGhlIHNhbXBsZSBub25jZQ==", key.encode())
            client.writer.write(sent)
            assert (await client.answer())[0] == 400

    asyncio.run(run())


def test_pages_of_other_origins_may_not_open_one(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        for origin in ("https://evil.example", "https://shop.example.evil.example", "null"):
            with pytest.raises(InvalidStatus, match="403"):
                async with opened(stack, "/shop/echo", who, origin=origin):
                    pass
        async with opened(stack, "/shop/echo", who, origin="https://shop.example"):
            pass
        async with opened(stack, "/shop/echo", who):
            pass  # no browser

    asyncio.run(run())


def test_where_websockets_are_not_served_the_request_is_answered_as_any_other(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            for _ in range(2):
                client.writer.write(asking("/off/echo", who.key))
                status, _, body = await client.answer()
                assert status == 200
                seen = {name.lower() for name, _ in json.loads(body)["headers"]}
                assert not seen & {"upgrade", "connection"}

    asyncio.run(run())
    assert int(stack.state(who)["requests"].total) == 2


@pytest.mark.parametrize(("path", "body"), [("plain", b""), ("plain", b"hello"), ("live", b"")])
def test_nobody_is_upgraded_to_anything_else(stack: Stack, path: str, body: bytes) -> None:
    who = stack.subscribe("open")
    others = ("h2c", "TLS/1.0", "websocketx", "foo, bar")

    async def run() -> None:
        async with raw(stack) as client:
            more = ("content-length: 5",) if body else ()
            for other in others:
                request = asking(f"/{path}/refuse?code=200", who.key, *more, upgrade=other) + body
                # Two at once: what follows is the next request, and not another protocol.
                client.writer.write(request * 2)
                assert [(await client.answer())[0] for _ in range(2)] == [200, 200]

    asyncio.run(run())
    assert int(stack.state(who)["requests"].total) == 2 * len(others)


@pytest.mark.parametrize(
    "change",
    [
        (b"connection: Upgrade", b"connection: keep-alive"),
        (b"connection: Upgrade", b"connection: Upgrade, close"),
        (b"GET ", b"POST "),
        (b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_what_only_looks_like_a_handshake_is_an_ordinary_request(
    stack: Stack, change: tuple[bytes, bytes]
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking("/live/refuse?code=200", who.key).replace(*change, 1))
            status, _, body = await client.answer()
            assert (status, body) == (200, b"nope\n")

    asyncio.run(run())


def test_a_request_behind_a_handshake_is_no_request_once_the_protocol_was_switched(
    stack: Stack, upstream: Upstream
) -> None:
    """And is one where it was not: nothing can be hidden from either end."""
    who = stack.subscribe("open")
    smuggled = PLAIN % who.key.encode()

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/live/sink?who={who.id}", who.key) + smuggled)
            assert (await client.answer())[0] == 101
            opcode, payload = await client.frame()
            assert (opcode, payload[:2]) == (8, b"\x03\xea")
            assert await client.reader.read() == b""
        async with raw(stack) as client:
            client.writer.write(asking("/live/refuse?code=401", who.key) + smuggled)
            assert [(await client.answer())[0] for _ in range(2)] == [401, 200]

    asyncio.run(run())
    assert upstream.messages[who.id] == 0
    # The handshakes, and the one request that was one.
    assert int(stack.state(who)["requests"].total) == 3


def test_frames_sent_before_a_refusal_reach_nobody(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking("/live/refuse?code=404", who.key) + frame(1, b"eager"))
            assert (await client.answer())[0] == 404
            assert (await client.answer())[0] in (400, 501)
            assert await client.reader.read() == b""

    asyncio.run(run())
