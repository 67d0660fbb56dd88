"""What a WebSocket costs: its handshake, slot, messages and bytes; and how a limit ends it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.keyspace import Keyspace
from tests.integration.websocket.talk import closed_line, ended, frame, opened, raw, reconfigure
from tests.integration.websocket.talk import handshake as asking
from tests.integration.websocket.upstream import Upstream
from tests.support.stack import Stack, Subscriber
from tests.support.wait import wait_until, wait_until_async


def total(stack: Stack, who: Subscriber, meter: str) -> int:
    use = stack.state(who).get(meter)
    return 0 if use is None else int(use.total)


def test_a_handshake_is_one_request_and_what_follows_is_free_unless_it_is_counted(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("five")

    async def run() -> None:
        for _ in range(5):
            async with opened(stack, "/live/echo", who) as client:
                for _ in range(20):
                    await client.send("x")
                    await client.recv()
        with pytest.raises(InvalidStatus) as caught:
            async with opened(stack, "/live/echo", who):
                pass
        assert caught.value.response.status_code == 429
        assert b"handshakes" in bytes(caught.value.response.body)

    asyncio.run(run())
    assert {meter: int(use.total) for meter, use in stack.state(who).items()} == {"requests": 5}
    assert upstream.messages[who.id] == 100


def test_each_message_is_counted_and_none_is_passed_on_beyond_the_limit(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("talk")

    async def run() -> None:
        async with opened(stack, "/messages/echo", who) as client:
            for number in range(10):
                await client.send(str(number))
                assert await client.recv() == str(number)
                # Counted before it was passed on, so in any case before it has come back.
                assert total(stack, who, "messages") == number + 1
            await client.ping(b"free")
            await client.send("one too many")
            assert await ended(client) == (1008, "limit reached: talk")

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1008, "limit reached: talk")], what="1008")
    assert upstream.messages[who.id] == 10
    assert total(stack, who, "messages") == 10
    line = closed_line(stack, who.id)
    assert (line["who"], line["code"], line["messages_in"]) == ("gateway", 1008, 10)
    stack.quiet()
    assert int(stack.ledger(who)["messages"].total) == 10


def test_of_many_at_once_exactly_those_pass_that_the_limit_allows(
    stack: Stack, upstream: Upstream
) -> None:
    """Three connections, and all their messages in one write each."""
    who = stack.subscribe("talk")

    async def one() -> None:
        async with raw(stack) as client:
            burst = frame(1, b"a", fin=False) + frame(9) + frame(0, b"b") + frame(2, b"c") * 10
            client.writer.write(asking(f"/messages/sink?who={who.id}", who.key))
            assert (await client.answer())[0] == 101
            client.writer.write(burst)
            opcode, payload = await client.frame()
            while opcode != 8:  # a pong
                opcode, payload = await client.frame()
            assert payload == b"\x03\xf0limit reached: talk"

    async def run() -> None:
        await asyncio.gather(one(), one(), one())

    asyncio.run(run())
    wait_until(lambda: upstream.open[who.id] == 0, what="the upstream's ends")
    assert upstream.messages[who.id] == total(stack, who, "messages") == 10


def test_bytes_of_both_ends_are_counted_as_they_are_on_the_wire(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("bytes")

    async def run() -> None:
        async with opened(stack, "/both/echo", who) as client:
            for _ in range(4):
                await client.send(b"x" * 100)
                await client.recv()
            await (await client.ping(b"x" * 10))
            await client.send(b"y" * 181)
            assert await ended(client) == (1008, "limit reached: volume")

    asyncio.run(run())
    # 800 of messages there and back, 20 of ping and pong, 181 on the way there, and 181 that do
    # not fit on the way back: that message was refused, and cost nothing.
    assert total(stack, who, "traffic") == 800 + 20
    assert total(stack, who, "messages") == 8
    assert upstream.messages[who.id] == 4


def test_a_message_larger_than_what_is_left_is_cut_off(stack: Stack, upstream: Upstream) -> None:
    who = stack.subscribe("bytes")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/both/sink?who={who.id}", who.key))
            assert (await client.answer())[0] == 101
            client.writer.write(frame(2, b"z" * 2000)[:708])
            await wait_until_async(lambda: total(stack, who, "traffic") == 700, what="a part")
            client.writer.write(b"z" * 301)
            assert (await client.frame())[1] == b"\x03\xf0limit reached: volume"

    asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1006, "")], what="the cut")
    assert upstream.messages[who.id] == 0
    assert total(stack, who, "traffic") == 700


def test_without_a_key_messages_are_limited_by_address(stack: Stack, upstream: Upstream) -> None:
    async def run() -> None:
        async with opened(stack, "/public/sink", query={"who": "nobody"}) as client:
            for _ in range(6):
                await client.send("x")
            assert await ended(client) == (1008, "limit reached: talk")

    asyncio.run(run())
    wait_until(lambda: upstream.open["nobody"] == 0, what="the upstream's end")
    assert upstream.messages["nobody"] == 5


def test_a_slot_is_held_as_long_as_the_connection_lives(stack: Stack) -> None:
    who = stack.subscribe("slots")
    key = Keyspace().leases(who.id, "at_once")

    def until() -> float:
        return max(score for _, score in stack.redis.zrange(key, 0, -1, withscores=True))

    async def run() -> None:
        async with opened(stack, "/live/echo", who):
            async with opened(stack, "/live/echo", who) as second:
                first = until()
                with pytest.raises(InvalidStatus, match="429"):
                    async with opened(stack, "/live/echo", who):
                        pass
                # A lease lasts 2 s, and is renewed for as long as it takes.
                await wait_until_async(lambda: until() >= first + 2500, what="renewals")
                await second.send("still here")
                assert await second.recv() == "still here"
            await wait_until_async(lambda: stack.leases(who, "at_once") == 1, what="one free")
            async with opened(stack, "/live/echo", who):
                pass

    asyncio.run(run())
    wait_until(lambda: stack.leases(who, "at_once") == 0, what="all free")


def test_a_refused_handshake_is_answered_as_it_is_and_charged_as_the_route_says(
    stack: Stack, upstream: Upstream
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        for code in (200, 302, 401, 404, 503):
            for route in ("live", "paid"):
                with pytest.raises(InvalidStatus) as caught:
                    async with opened(stack, f"/{route}/refuse", who, query={"code": code}):
                        pass
                answer = caught.value.response
                assert (answer.status_code, bytes(answer.body)) == (code, b"nope\n")
                assert answer.headers["x-told"] == "yes"
        async with opened(stack, "/paid/echo", who):
            pass
        with pytest.raises(InvalidStatus, match="502"):
            async with opened(stack, "/nobody/echo", who):
                pass

    asyncio.run(run())
    # Five on the route that charges all, one success and the one that was opened on the other;
    # the upstream that is not there cost nothing.
    wait_until(lambda: total(stack, who, "requests") == 5 + 1 + 1, what="refunds")


def test_a_key_that_is_revoked_ends_its_websockets(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> tuple[int, str]:
        async with opened(stack, "/live/echo", who) as client:
            await client.send("x")
            await client.recv()
            await asyncio.to_thread(stack.directory, "revoke_key", who.key_id)
            return await ended(client)

    assert asyncio.run(run()) == (1008, "the key is not valid any more")


def test_another_plan_ends_the_websockets_of_the_one_before(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> tuple[int, str]:
        async with opened(stack, "/live/echo", who) as client:
            await asyncio.to_thread(stack.directory, "set_plan", who.id, "five")
            return await ended(client)

    assert asyncio.run(run()) == (1012, "the plan was changed; connect again")


def test_a_limit_that_is_changed_is_in_force_for_what_is_open(stack: Stack) -> None:
    who = stack.subscribe("loose")
    before = stack.config.read_text()

    async def run() -> tuple[int, str]:
        async with opened(stack, "/both/sink", who) as client:
            for _ in range(10):
                await client.send("x")
            await wait_until_async(lambda: total(stack, who, "messages") == 10, what="ten")
            after = before.replace(
                "meter: messages, action: warn", "meter: messages, action: block"
            )
            await asyncio.to_thread(reconfigure, stack, after)
            with suppress(ConnectionClosed):
                while True:
                    await client.send("x")
                    await asyncio.sleep(0.02)
            return await ended(client)

    try:
        assert asyncio.run(run()) == (1008, "limit reached: loose")
    finally:
        reconfigure(stack, before)
