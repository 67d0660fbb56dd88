"""Clients that cost more than they ask for: each ends its own connection, and nobody else's."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable

import pytest
from h2.settings import SettingCodes
from hpack import Encoder

from gateway.http.exchange import Exchange
from gateway.http.h2_guard import CONTROL, RESETS
from gateway.http.server import Limits
from tests.support.h2 import PREFACE, Client, frame, on_uvloop, serving
from tests.support.wait import wait_until_async

PROTOCOL_ERROR, FRAME_SIZE_ERROR, CALM = 1, 6, 11
END_STREAM, END_HEADERS = 1, 4
HEAD = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/")]


async def hello(exchange: Exchange) -> None:
    exchange.respond(200, [], b"hello")


def block() -> bytes:
    return bytes(Encoder().encode(HEAD))


def settings() -> bytes:
    return frame(4, 0, 0, b"")


FLOODS: dict[str, Callable[[int], bytes]] = {
    "pings": lambda _: frame(6, 0, 0, bytes(8)),
    "settings": lambda n: frame(4, 0, 0, struct.pack(">HI", 3, n)),
    "acknowledgements": lambda _: frame(4, 1, 0, b""),
    "priorities": lambda n: frame(2, 0, 2 * n + 101, struct.pack(">IB", 0, 1)),
    "unknown frames": lambda _: frame(99, 0, 0, b"x"),
    "room on the connection": lambda _: frame(8, 0, 0, struct.pack(">I", 1)),
    "resets of nothing": lambda _: frame(3, 0, 1, struct.pack(">I", 8)),
    "empty data": lambda _: frame(0, 0, 1, b""),
    "padding": lambda _: frame(0, 8, 1, b"\x01\0"),
}


@pytest.mark.parametrize("flood", FLOODS)
@on_uvloop
async def test_floods(flood: str) -> None:
    make = FLOODS[flood]
    async with serving(hello) as at, Client.to(at.port, hello=False) as client:
        await client.raw(PREFACE + settings() + frame(1, END_HEADERS, 1, block()))
        client.blind = True
        reading = asyncio.create_task(client.gone())
        for start in range(0, 5 * CONTROL, 500):
            await client.raw(b"".join(make(n) for n in range(start, start + 500)))
            if reading.done():
                break
        await reading
        assert [code for code, _ in client.goaways] == [CALM]
        assert at.events == {"h2_flood": 1}
        async with Client.to(at.port) as other:
            assert (await other.ask()).body == b"hello"


@on_uvloop
async def test_what_is_explained_by_traffic_is_no_flood() -> None:
    """A long download in small steps: one update of the window for each kilobyte."""

    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], b"x" * 1_000_000)

    async with serving(handler) as at, Client.to(at.port) as client:
        client.greedy = False
        stream = await client.begin()
        got = 0
        while not client.streams[stream].ended:
            await client.receive()
            while got + 1000 <= len(client.streams[stream].body):
                got += 1000
                client.h2.increment_flow_control_window(1000)
                if not client.streams[stream].ended:
                    client.h2.increment_flow_control_window(1000, stream)
                await client.flush()
    assert len(client.streams[stream].body) == 1_000_000
    assert not at.events


@on_uvloop
async def test_room_for_one_byte_after_the_other() -> None:
    """CVE-2019-9511: each update has us send a frame."""

    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], b"x" * 100_000)

    async with serving(handler) as at, Client.to(at.port, hello=False) as client:
        client.blind = True
        no_room = frame(4, 0, 0, struct.pack(">HI", 4, 0))
        await client.raw(PREFACE + no_room + frame(1, END_HEADERS | END_STREAM, 1, block()))
        while not client.closed:
            await client.raw(frame(8, 0, 1, struct.pack(">I", 1)))
            await client.receive()  # the byte, as a rule
    assert [code for code, _ in client.goaways] == [CALM]
    assert at.events == {"h2_flood": 1}


@on_uvloop
async def test_a_table_of_header_fields_of_any_size_is_not_filled() -> None:
    async with serving(hello) as at, Client.to(at.port, hello=False) as client:
        client.h2.local_settings[SettingCodes.HEADER_TABLE_SIZE] = 100_000_000
        client.h2.local_settings.acknowledge()
        client.h2.decoder.max_allowed_table_size = 100_000_000
        client.h2.initiate_connection()
        await client.flush()
        for _ in range(5):
            assert (await client.ask()).body == b"hello"
        # It would say so before it used more.
        assert client.h2.decoder.header_table_size == 4096
        client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 0})
        await client.flush()
        assert (await client.ask()).body == b"hello"
        await client.until(lambda: client.h2.decoder.header_table_size == 0)


@on_uvloop
async def test_requests_reset_at_once() -> None:
    """CVE-2023-44487: what is asked and taken back again and again."""
    begun = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)
        exchange.respond(200, [])

    async with serving(handler) as at, Client.to(at.port) as client:
        client.blind = True
        reading = asyncio.create_task(client.gone())
        reset = struct.pack(">I", 8)
        pieces = [
            frame(1, END_HEADERS | END_STREAM, number, block()) + frame(3, 0, number, reset)
            for number in range(1, 20_001, 2)
        ]
        for start in range(0, len(pieces), 100):
            await client.raw(b"".join(pieces[start : start + 100]))
            if reading.done():
                break
        await reading
        assert at.events == {"h2_resets": 1}
    assert [code for code, _ in client.goaways] == [CALM]
    assert begun <= RESETS + 1


@on_uvloop
async def test_handlers_of_reset_requests_count_as_long_as_they_run() -> None:
    release = asyncio.Event()
    running = most = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1
        exchange.respond(200, [])

    async with serving(handler, limits=Limits(streams=5)) as at, Client.to(at.port) as client:
        for _ in range(30):
            stream = await client.begin()
            client.h2.reset_stream(stream)
        await client.flush()
        last = await client.begin()
        assert (await client.answer(last)).reset is not None
        release.set()
        await wait_until_async(lambda: not running, what="the end of all")
        assert (await client.ask()).status == 200
    assert most == 5


@pytest.mark.parametrize("size", [0, 1, 10_000])
@on_uvloop
async def test_header_blocks_without_end(size: int) -> None:
    async with serving(hello) as at, Client.to(at.port) as client:
        reading = asyncio.create_task(client.gone())
        await client.raw(frame(1, END_STREAM, 1, block()))
        for _ in range(200):
            await client.raw(frame(9, 0, 1, b"\0\x01a\x01b"[:size] + b"x" * (size - 5)))
            if reading.done():
                break
        await reading
    assert [code for code, _ in client.goaways] == [CALM]
    assert at.events.total() == 1


@on_uvloop
async def test_a_small_block_that_grows_when_it_is_decoded() -> None:
    """The table holds a long field, the block asks for it a thousand times."""
    limits = Limits(head=16_384)
    async with serving(hello, limits=limits) as at, Client.to(at.port) as client:
        encoder = Encoder()
        first = encoder.encode([*HEAD, ("x-long", "a" * 3000)])
        await client.raw(frame(1, END_HEADERS | END_STREAM, 1, first))
        again = encoder.encode([*HEAD, *[("x-long", "a" * 3000)] * 1000])
        assert len(again) < 1100
        await client.raw(frame(1, END_HEADERS | END_STREAM, 3, again))
        await client.gone()
    assert [code for code, _ in client.goaways] == [CALM]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(0, 0, 0, b"x"), PROTOCOL_ERROR),
        (PREFACE, None),
        (frame(0, 0, 7, b"x"), PROTOCOL_ERROR),
        (frame(0, 8, 1, b"\xff"), PROTOCOL_ERROR),
        (frame(1, END_HEADERS, 2, block()), PROTOCOL_ERROR),
        (frame(1, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff"), None),
        (frame(1, 0, 1, block()) + frame(6, 0, 0, bytes(8)), PROTOCOL_ERROR),
        (frame(5, END_HEADERS, 1, struct.pack(">I", 2) + block()), PROTOCOL_ERROR),
        (frame(8, 0, 0, struct.pack(">I", 0)), PROTOCOL_ERROR),
        (frame(8, 0, 0, struct.pack(">I", 2**31 - 1)) * 2, None),
        (frame(6, 0, 0, b"x"), None),
        (frame(4, 0, 0, b"x"), None),
        (frame(4, 0, 0, struct.pack(">HI", 5, 1)), None),
        (frame(0, 0, 1, bytes(16_385)), FRAME_SIZE_ERROR),
        (frame(1, END_HEADERS, 1, bytes(20_000)), FRAME_SIZE_ERROR),
    ],
)
@on_uvloop
async def test_frames_that_are_wrong_end_the_connection(data: bytes, code: int | None) -> None:
    async with serving(hello) as at, Client.to(at.port) as client:
        await client.raw(data)
        await client.gone()
    assert len(client.goaways) == 1
    assert code is None or client.goaways[0][0] == code
    assert at.events == {"h2_protocol": 1}


@on_uvloop
async def test_settings_come_first() -> None:
    async with serving(hello) as at, Client.to(at.port, hello=False) as client:
        client.blind = True
        await client.raw(PREFACE + frame(1, END_HEADERS | END_STREAM, 1, block()))
        await client.gone()
    assert [code for code, _ in client.goaways] == [PROTOCOL_ERROR]


@pytest.mark.parametrize(
    "start",
    [
        b"PRI * HTTP/2.0\r\n",
        PREFACE,
        PREFACE + settings() + b"\0\0",
        PREFACE + settings() + frame(1, END_STREAM, 1, block()),
        PREFACE + settings() + frame(1, END_STREAM | END_HEADERS, 1, block())[:-1],
    ],
)
@on_uvloop
async def test_who_stops_in_the_middle_is_not_waited_for(start: bytes) -> None:
    limits = Limits(head_s=1)
    async with serving(hello, limits=limits) as at, Client.to(at.port, hello=False) as client:
        await client.raw(start)
        await asyncio.wait_for(client.reader.read(-1), 20)
        client.writer.close()
        await wait_until_async(lambda: not at.server.connections, what="the end")


@on_uvloop
async def test_whatever_is_sent_the_server_goes_on() -> None:
    """Frames of all kinds with bits turned over, in any order; what they raise fails the test."""
    random_ = random.Random(7)
    encoder = Encoder()
    kinds = [
        lambda n: frame(1, END_HEADERS, n, encoder.encode(HEAD)),
        lambda n: frame(1, END_HEADERS | END_STREAM, n, encoder.encode(HEAD)),
        lambda n: frame(0, random_.choice((0, 1, 8)), n, random_.randbytes(random_.randrange(50))),
        lambda n: frame(3, 0, n, struct.pack(">I", 8)),
        lambda n: frame(8, 0, random_.choice((0, n)), struct.pack(">I", random_.randrange(2**31))),
        lambda n: frame(random_.randrange(12), random_.randrange(64), n, random_.randbytes(9)),
        lambda n: frame(4, 0, 0, struct.pack(">HI", n % 8, random_.randrange(2**20))),
        lambda _: frame(6, 0, 0, bytes(8)),
        lambda _: frame(7, 0, 0, bytes(8)),
    ]
    async with serving(hello) as at:
        for _ in range(300):
            data = bytearray(settings())
            for number in range(1, 40, 2):
                data += random_.choice(kinds)(random_.choice((number, 1, 3)))
            for _ in range(random_.choice((0, 0, 1, 3))):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
            async with Client.to(at.port, hello=False) as client:
                await client.raw(PREFACE + bytes(data))
                client.writer.write_eof()
                await asyncio.wait_for(client.reader.read(-1), 20)
        async with Client.to(at.port) as client:
            assert (await client.ask()).body == b"hello"
        await wait_until_async(lambda: at.server.connections <= 1, what="all gone")
