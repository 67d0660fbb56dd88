"""What passes through a WebSocket that is not counted, by ends of another maker."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.integration.websocket.talk import closed_line, ended, frame, opened, raw
from tests.integration.websocket.talk import handshake as asking
from tests.integration.websocket.upstream import Upstream
from tests.support.stack import Stack
from tests.support.wait import wait_until, wait_until_async

MIB = 2**20
CLOSE = 8


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_messages_of_all_kinds_come_back_as_they_were_sent(
    stack: Stack, compression: str | None
) -> None:
    who = stack.subscribe("open")
    shapes: list[str | bytes] = ["", "text", "ünïcode ✓", b"", b"\x00\xff" * 63, os.urandom(125)]
    shapes += [os.urandom(126), os.urandom(65_535), os.urandom(65_536), "x" * 200_000]

    async def run() -> None:
        async with opened(stack, "/live/echo", who, compression=compression) as client:
            agreed = [str(name) for name in client.protocol.extensions]
            assert len(agreed) == (1 if compression else 0)
            for message in shapes:
                await client.send(message)
                assert await client.recv() == message
            await client.send(iter(["frag", "men", "", "ted"]))
            assert await client.recv() == "fragmented"
            big = os.urandom(5_000_000)
            await client.send(big)
            assert await client.recv() == big
            await (await client.ping(b"are you there"))

    asyncio.run(run())
    line = closed_line(stack, who.id)
    assert line["messages_in"] == line["messages_out"] == len(shapes) + 2
    assert line["bytes_in"] > 5_000_000
    assert (line["who"], line["code"]) == ("client", 1000)
    assert (line["route"], line["plan"]) == ("live", "open")


def test_what_the_upstream_is_asked_and_what_the_client_is_told(stack: Stack) -> None:
    who = stack.subscribe("five")

    async def run() -> None:
        headers = {"x-mine": "kept", "cookie": "a=b"}
        async with opened(
            stack, "/live/headers", who, headers=headers, subprotocols=["odd", "chat"],
            compression="deflate",
        ) as client:  # fmt: skip
            assert client.subprotocol == "chat"
            assert client.response is not None
            assert 'handshakes";r=4' in client.response.headers["ratelimit"]
            seen = json.loads(str(await client.recv()))
            names = {name.lower(): value for name, value in seen}
            assert names["x-mine"] == "kept"
            assert names["cookie"] == "a=b"
            assert names["x-forwarded-for"] == "127.0.0.1"
            assert names["sec-websocket-extensions"].startswith("permessage-deflate")
            assert "x-api-key" not in names
            assert who.key not in json.dumps(seen)
        # Browsers cannot set headers: a key in the query, which does not go on either.
        async with opened(stack, "/live/headers", query={"key": who.key}) as client:
            assert who.key not in str(await client.recv())

    asyncio.run(run())
    assert stack.state(who)["requests"].total == 2


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1011, 3000, 4999])
def test_a_close_reaches_the_other_end_with_its_code_and_reason(
    stack: Stack, upstream: Upstream, code: int
) -> None:
    who, other = stack.subscribe("open"), stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/live/echo", who) as client:
            await client.close(code, "enough")
        async with opened(stack, "/live/close", other, query={"code": code}) as client:
            assert await ended(client) == (code, "as asked")

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(code, "enough")], what="the close")
    line, told = closed_line(stack, who.id), closed_line(stack, other.id)
    assert (line["who"], line["code"], line["reason"]) == ("client", code, "enough")
    assert (told["who"], told["code"], told["reason"]) == ("upstream", code, "as asked")


def test_an_end_that_vanishes_ends_the_other(stack: Stack, upstream: Upstream) -> None:
    who, other = stack.subscribe("open"), stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/live/sink", who) as client:
            await client.send("last words")
            client.transport.abort()
        async with opened(stack, "/live/vanish", other) as client:
            await client.send("go")
            code, reason = await ended(client)
            assert code == 1014
            assert "upstream" in reason

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1006, "")], what="the loss")
    assert upstream.messages[who.id] == 1
    line, told = closed_line(stack, who.id), closed_line(stack, other.id)
    assert (line["who"], line["code"]) == ("client", 1006)
    assert (told["who"], told["code"]) == ("upstream", 1006)


def test_who_breaks_the_protocol_is_told_and_so_is_the_other(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/live/sink?who={who.id}", who.key))
            status, fields, _ = await client.answer()
            assert status == 101
            assert fields["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".lower()
            # Two good messages, one of them in pieces around a ping, and a frame that is none.
            client.writer.write(frame(1, b"one") + frame(1, b"tw", fin=False) + frame(9, b"?"))
            client.writer.write(frame(0, b"o") + frame(3, b"bad") + frame(1, b"never"))
            # The upstream's pong may come before it, or not at all.
            opcode, payload = await client.frame()
            while opcode != CLOSE:
                opcode, payload = await client.frame()
            assert payload == b"\x03\xeaan unknown opcode"
            assert await client.reader.read() == b""

    asyncio.run(run())
    wait_until(lambda: [code for code, _ in upstream.ends.get(who.id, [])] == [1001], what="1001")
    assert upstream.messages[who.id] == 2
    line = closed_line(stack, who.id)
    assert (line["who"], line["code"]) == ("client", 1002)


def test_a_message_that_is_too_big_is_not_passed_on(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/small/echo", who) as client:
            await client.send("x" * 1000)
            assert await client.recv() == "x" * 1000
            await client.send("x" * 1001)
            assert await ended(client) == (1009, "messages may have 1000 bytes")

    asyncio.run(run())
    wait_until(lambda: upstream.open[who.id] == 0, what="the upstream's end")
    assert upstream.messages[who.id] == 1


def test_who_is_idle_is_sent_away_and_who_is_not_stays(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/idle/sink", who) as client:
            assert await ended(client) == (1001, "idle for 1 s")

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1001, "idle for 1 s")], what="the close")
    assert closed_line(stack, who.id)["who"] == "gateway"


def worker(stack: Stack) -> int:
    pid = stack.gateways[0].pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_an_end_that_does_not_read_costs_a_bounded_amount_of_memory(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        before = resident(worker(stack))
        async with (
            opened(stack, "/live/deaf", who) as up,
            opened(stack, "/live/push", who, query={"n": 64, "size": MIB}) as down,
        ):
            down.transport.pause_reading()
            sending = asyncio.create_task(flood(up))
            # Nothing moves any more: all buffers are full.
            await stuck(up)
            assert not sending.done()
            assert resident(worker(stack)) - before < 8 * MIB
            sending.cancel()
            down.transport.resume_reading()
            for _ in range(64):
                assert len(await down.recv()) == MIB
            upstream.cut(who.id)

    async def flood(client: object) -> None:
        for _ in range(64):
            await client.send(b"x" * MIB)  # type: ignore[attr-defined]

    async def stuck(client: object) -> None:
        sizes: list[int] = []

        def still() -> bool:
            sizes.append(client.transport.get_write_buffer_size())  # type: ignore[attr-defined]
            return len(sizes) > 10 and sizes[-1] > 0 and len(set(sizes[-10:])) == 1

        await wait_until_async(still, what="standstill")

    asyncio.run(run())


def test_no_more_are_open_on_a_route_than_it_allows(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/few/echo", who):
            with pytest.raises(Exception, match="HTTP 503"):
                async with opened(stack, "/few/echo", who):
                    pass

        async def again() -> bool:
            async with opened(stack, "/few/echo", who):
                return True

        await wait_until_async(again, what="room for another")

    asyncio.run(run())
    closed = "tallygate_websocket_closed_total"
    wait_until(lambda: stack.metric(closed, route="few", code="1000") == 2, what="both counted")
    assert stack.metric("tallygate_websockets", route="few") == 0


def test_the_first_frames_may_come_with_the_handshake(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/live/echo?who={who.id}", who.key) + frame(1, b"eager"))
            assert (await client.answer())[0] == 101
            assert await client.frame() == (1, b"eager")
            client.writer.write(frame(CLOSE, b"\x03\xe8"))
            assert await client.frame() == (CLOSE, b"\x03\xe8")
            assert await client.reader.read() == b""

    asyncio.run(run())


def test_after_a_close_nothing_is_passed_on(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/live/sink?who={who.id}", who.key))
            await client.answer()
            client.writer.write(frame(1, b"x") + frame(CLOSE, b"\x03\xe8") + frame(1, b"late"))
            assert await client.frame() == (CLOSE, b"\x03\xe8")

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1000, "")], what="the close")
    assert upstream.messages[who.id] == 1


def test_a_compressed_frame_is_refused_where_compression_was_not_agreed_on(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/live/echo", who) as client:
            client.transport.write(b"\xc1" + frame(1, b"x")[1:])
            assert (await ended(client))[0] == 1002

    asyncio.run(run())
