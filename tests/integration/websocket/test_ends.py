"""What a killed and a stopped gateway leave behind; upstreams that do not play by the rules."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.integration.websocket.talk import closed_line, ended, frame, opened, raw, reconfigure
from tests.integration.websocket.talk import handshake as asking
from tests.integration.websocket.upstream import Upstream
from tests.support.stack import Stack
from tests.support.wait import wait_until, wait_until_async

OWN = 1  # a second gateway of the stack, for tests that end it


@pytest.fixture
def own_gateway(stack: Stack) -> int:
    if len(stack.gateways) <= OWN:
        stack.start_gateway(1)
    elif stack.gateways[OWN].popen.poll() is not None:
        stack.start_gateway(1, OWN)
    process = stack.gateways[OWN]  # which has a new worker in place of a killed one
    process.wait_for_http(f"http://127.0.0.1:{stack.ports[OWN]}/-/readyz")
    return OWN


def worker(stack: Stack, gateway: int) -> int:
    pid = stack.gateways[gateway].pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_a_killed_worker_has_counted_all_that_was_passed_on(
    stack: Stack, upstream: Upstream, own_gateway: int
) -> None:
    who = stack.subscribe("open")

    async def run() -> int:
        sent = 0
        async with opened(stack, "/messages/sink", who, gateway=own_gateway) as client:

            async def talk() -> None:
                nonlocal sent
                while True:
                    await client.send(f"message {sent}")
                    sent += 1
                    await asyncio.sleep(0)

            talking = asyncio.create_task(talk())
            await wait_until_async(lambda: upstream.messages[who.id] >= 500, what="messages")
            os.kill(worker(stack, own_gateway), signal.SIGKILL)
            assert (await ended(client))[0] == 1006
            talking.cancel()
        return sent

    sent = asyncio.run(run())
    wait_until(lambda: upstream.ends.get(who.id) == [(1006, "")], what="the upstream's end")
    received = upstream.messages[who.id]
    stack.quiet()
    counted = int(stack.ledger(who)["messages"].total)
    assert int(stack.ledger(who)["requests"].total) == 1
    assert received <= counted <= sent
    # What one question was about, and what was on its way: see docs/websocket.md.
    assert counted - received <= (3 * 65_536 + 2 * 256_000) / len(frame(1, b"message 500"))


def test_messages_one_by_one_are_counted_one_by_one_when_the_worker_is_killed(
    stack: Stack, upstream: Upstream, own_gateway: int
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with opened(stack, "/messages/echo", who, gateway=own_gateway) as client:
            for number in range(20):
                await client.send(str(number))
                await client.recv()
            os.kill(worker(stack, own_gateway), signal.SIGKILL)
            assert (await ended(client))[0] == 1006

    asyncio.run(run())
    stack.quiet()
    assert int(stack.ledger(who)["messages"].total) == upstream.messages[who.id] == 20


def test_a_gateway_that_stops_says_so_and_gives_slots_back(
    stack: Stack, upstream: Upstream, own_gateway: int
) -> None:
    who = stack.subscribe("slots")

    async def run() -> None:
        async with opened(stack, "/live/echo", who, gateway=own_gateway) as client:
            await client.send("x")
            await client.recv()
            stack.gateways[own_gateway].signal(signal.SIGTERM)
            assert await ended(client) == (1001, "the gateway is restarting")

    asyncio.run(run())
    assert stack.gateways[own_gateway].wait() == 0
    assert upstream.ends[who.id] == [(1001, "the gateway is restarting")]
    assert stack.leases(who, "at_once") == 0
    line = closed_line(stack, who.id, own_gateway)
    assert (line["who"], line["code"]) == ("gateway", 1001)


@pytest.mark.parametrize(
    ("what", "status"),
    [
        *((what, 502) for what in ("unproven", "wrong", "unswitched", "other")),
        *((what, 502) for what in ("protocol", "extension")),
        ("silent", 504),
    ],
)
def test_an_upstream_that_does_not_switch_as_it_should_is_no_good(
    stack: Stack, what: str, status: int
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/odd/{what}", who.key))
            assert (await client.answer())[0] == status

    asyncio.run(run())
    wait_until(lambda: int(stack.state(who)["requests"].total) == 0, what="the refund")


def test_frames_that_come_with_the_switch_are_passed_on(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking("/odd/prompt", who.key))
            assert (await client.answer())[0] == 101
            assert await client.frame() == (1, b"hello")

    asyncio.run(run())
    line = closed_line(stack, who.id)
    assert (line["who"], line["code"], line["messages_out"]) == ("client", 1006, 1)


@pytest.mark.parametrize(
    ("what", "before"), [("masked", []), ("unknown", [(1, b"hello")])], ids=["masked", "unknown"]
)
def test_an_upstream_that_breaks_the_protocol_is_a_bad_gateway(
    stack: Stack, what: str, before: list[tuple[int, bytes]]
) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking(f"/odd/{what}", who.key))
            assert (await client.answer())[0] == 101
            for expected in before:
                assert await client.frame() == expected
            opcode, payload = await client.frame()
            assert (opcode, int.from_bytes(payload[:2], "big")) == (8, 1014)

    asyncio.run(run())
    line = closed_line(stack, who.id)
    assert (line["who"], line["code"]) == ("upstream", 1002)


def test_a_frame_that_is_never_finished_ends_without_a_close(stack: Stack) -> None:
    who = stack.subscribe("open")

    async def run() -> None:
        async with raw(stack) as client:
            client.writer.write(asking("/odd/half", who.key))
            assert (await client.answer())[0] == 101
            # A close in the middle of a frame would be taken for its payload.
            assert (await client.reader.read()).endswith(b"begin")

    asyncio.run(run())
    line = closed_line(stack, who.id)
    assert (line["who"], line["code"]) == ("upstream", 1006)


def test_a_route_that_serves_no_websockets_any_more_ends_those_that_are_open(
    stack: Stack,
) -> None:
    who = stack.subscribe("open")
    before = stack.config.read_text()

    async def run() -> tuple[int, str]:
        async with opened(stack, "/few/echo", who) as client:
            after = before.replace("websocket: {max_connections: 1, recheck: 1s}", "")
            assert after != before
            await asyncio.to_thread(reconfigure, stack, after)
            return await ended(client)

    try:
        assert asyncio.run(run()) == (1012, "the route was changed; connect again")
    finally:
        reconfigure(stack, before)


def test_without_redis_what_costs_is_passed_on_only_where_the_route_says_so(
    stack: Stack, upstream: Upstream
) -> None:
    """Last in this file: it ends Redis, and starts it again on the same data."""
    who = stack.subscribe("talk")

    async def run() -> None:
        async with (
            opened(stack, "/messages/echo", who) as counted,
            opened(stack, "/kept/echo", who) as kept,
            opened(stack, "/live/echo", who) as free,
        ):
            await counted.send("one")
            await counted.recv()
            assert stack.valkey.process is not None
            stack.valkey.process.kill()
            stack.valkey.process.wait()
            await counted.send("two")
            code, reason = await ended(counted)
            assert (code, reason.partition(";")[0]) == (
                1013,
                "usage cannot be counted at the moment",
            )
            await free.send("what costs nothing goes on")
            assert await free.recv() == "what costs nothing goes on"
            for number in range(3):
                await kept.send(f"counted afterwards {number}")
                assert await kept.recv() == f"counted afterwards {number}"

    asyncio.run(run())
    stack.valkey.start()
    wait_until(lambda: stack.get("/-/readyz").status_code == 200, what="Redis back")
    assert upstream.messages[who.id] == 1 + 1 + 3
    wait_until(lambda: int(stack.state(who)["messages"].total) == 1 + 3, what="the replay")
