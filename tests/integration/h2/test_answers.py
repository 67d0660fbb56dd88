"""Answers over HTTP/2: framing, flow control both ways, the end of connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from h2.settings import SettingCodes

from gateway.http.exchange import Exchange
from gateway.http.server import Limits
from tests.support.h2 import Client, on_uvloop, serving
from tests.support.wait import wait_until_async

NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL = 0, 2, 7, 8


@on_uvloop
async def test_forms_of_answers() -> None:
    async def handler(exchange: Exchange) -> None:
        match exchange.request.path:
            case "/whole":
                exchange.respond(200, [(b"x-a", b"1"), (b"x-a", b"2")], b"body")
            case "/empty":
                exchange.respond(201, [])
            case "/none":
                exchange.respond(204, [])
            case "/not-modified":
                exchange.respond(304, [(b"etag", b"x")], length=7)
            case "/head":
                exchange.respond(200, [], b"body")
            case "/pieces":
                exchange.inform(103, [(b"link", b"</a>")])
                exchange.start(200, [(b"connection", b"close"), (b"date", b"mine")])
                for piece in (b"a", b"", b"b"):
                    exchange.write(piece)
                exchange.end([(b"x-sum", b"2")])
            case "/known":
                exchange.start(200, [], 2)
                exchange.write(b"abc")
                exchange.end()

    async with serving(handler) as at, Client.to(at.port) as client:
        whole = await client.ask(path="/whole")
        assert (whole.status, whole.body) == (200, b"body")
        assert whole.headers["content-length"] == "4"
        assert "GMT" in whole.headers["date"]
        empty = await client.ask(path="/empty")
        assert (empty.status, empty.headers["content-length"]) == (201, "0")
        none = await client.ask(path="/none")
        assert (none.status, none.headers.get("content-length")) == (204, None)
        unmodified = await client.ask(path="/not-modified")
        assert (unmodified.status, unmodified.headers["content-length"]) == (304, "7")
        head = await client.ask("HEAD", "/head")
        assert (head.body, head.headers["content-length"]) == (b"", "4")
        pieces = await client.ask(path="/pieces")
        assert (pieces.interim, pieces.body, pieces.trailers) == ([103], b"ab", {"x-sum": "2"})
        assert pieces.headers["date"] == "mine"
        assert "connection" not in pieces.headers
        assert (await client.ask(path="/known")).body == b"ab"


def cut_head(exchange: Exchange) -> None:
    exchange.abort()


def cut_body(exchange: Exchange) -> None:
    exchange.start(200, [])
    exchange.write(b"part")
    exchange.abort()


def cut_short(exchange: Exchange) -> None:
    exchange.start(200, [], 10)
    exchange.write(b"part")
    exchange.end()


@pytest.mark.parametrize("cut", [cut_head, cut_body, cut_short])
@on_uvloop
async def test_half_an_answer_is_never_taken_for_a_whole_one(
    cut: Callable[[Exchange], None],
) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange.request.path == "/cut":
            cut(exchange)
        else:
            exchange.respond(200, [], b"ok")

    async with serving(handler) as at, Client.to(at.port) as client:
        answer = await client.ask(path="/cut")
        assert not answer.ended
        assert answer.reset == INTERNAL_ERROR
        assert (await client.ask()).body == b"ok"


@on_uvloop
async def test_a_line_break_never_gets_into_an_answer() -> None:
    raised = []

    async def handler(exchange: Exchange) -> None:
        for attempt in (exchange.respond, exchange.start):
            try:
                attempt(200, [(b"x", b"1\r\ny: 2")])
            except ValueError:
                raised.append(attempt.__name__)
        exchange.respond(502, [])

    async with serving(handler) as at, Client.to(at.port) as client:
        assert (await client.ask()).status == 502
    assert raised == ["respond", "start"]


@on_uvloop
async def test_a_client_that_makes_no_room_waits_alone() -> None:
    """Its answer stops, in bounded memory; others on its connection go on."""
    slow: list[Exchange] = []
    most = 0
    done = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        nonlocal most
        if exchange.request.path == "/big":
            slow.append(exchange)
            exchange.start(200, [])
            for _ in range(100):
                exchange.write(b"x" * 10_000)
                most = max(most, exchange.unsent)  # type: ignore[attr-defined]
                if exchange.must_drain:
                    await exchange.drain()
            exchange.end()
            done.set()
        else:
            exchange.respond(200, [], b"small")

    async with serving(handler) as at, Client.to(at.port) as client:
        client.h2.increment_flow_control_window(10_000_000)
        client.greedy = False
        big = await client.begin(path="/big")
        await client.until(lambda: len(client.streams[big].body) == 65_535)
        await wait_until_async(lambda: slow[0].must_drain, what="back-pressure")
        assert (await client.ask()).body == b"small"
        assert len(client.streams[big].body) == 65_535
        assert not done.is_set()
        client.h2.increment_flow_control_window(2_000_000, big)
        await client.flush()
        answer = await client.answer(big)
    assert (answer.ended, len(answer.body)) == (True, 1_000_000)
    assert most <= 64 * 1024 + 10_000


@on_uvloop
async def test_answers_share_a_connection() -> None:
    """A long answer does not make a short one wait for its end."""

    async def handler(exchange: Exchange) -> None:
        size = 3_000_000 if exchange.request.path == "/long" else 1
        exchange.respond(200, [], b"x" * size)

    async with serving(handler) as at, Client.to(at.port) as client:
        client.h2.increment_flow_control_window(100_000_000)
        client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 50_000_000})
        await client.flush()
        long = await client.begin(path="/long")
        await client.until(lambda: client.streams[long].body)
        short = await client.ask()
        assert short.ended
        assert not client.streams[long].ended
        assert len((await client.answer(long)).body) == 3_000_000


@on_uvloop
async def test_an_upload_is_taken_no_faster_than_it_is_read() -> None:
    read = asyncio.Event()
    total = 0
    exchanges: list[Exchange] = []

    async def handler(exchange: Exchange) -> None:
        nonlocal total
        exchanges.append(exchange)
        await read.wait()
        while piece := await exchange.read():
            total += len(piece)
        exchange.respond(200, [])

    window = 100_000
    async with (
        serving(handler, limits=Limits(stream_window=window, connection_window=150_000)) as at,
        Client.to(at.port) as client,
    ):
        await client.until(lambda: client.h2.remote_settings.initial_window_size == window)
        stream = await client.begin("POST", end=False)
        upload = asyncio.create_task(client.send(stream, b"x" * 1_000_000, end=True))
        await wait_until_async(
            lambda: client.h2.local_flow_control_window(stream) == 0, what="a full window"
        )
        await wait_until_async(
            lambda: exchanges[0].body.unread == window,  # type: ignore[attr-defined]
            what="a full buffer",
        )
        read.set()
        await upload
        assert (await client.answer(stream)).status == 200
    assert total == 1_000_000


@on_uvloop
async def test_uploads_that_nobody_reads_do_not_stop_the_others() -> None:
    """What was sent for an answer that came early is dropped, and its room is given back."""

    async def handler(exchange: Exchange) -> None:
        if exchange.request.path == "/refuse":
            exchange.respond(413, [], b"no")
            return
        size = 0
        while piece := await exchange.read():
            size += len(piece)
        exchange.respond(200, [], b"%d" % size)

    async with serving(handler) as at, Client.to(at.port) as client:
        for _ in range(30):
            stream = await client.begin("POST", "/refuse", end=False)
            await client.send(stream, b"x" * 100_000)
            answer = await client.answer(stream)
            assert (answer.status, answer.ended) == (413, True)
            await client.until(lambda answer=answer: answer.reset is not None)
            assert answer.reset == NO_ERROR
        assert (await client.ask("POST", "/read", body=b"x" * 3_000_000)).body == b"3000000"


@on_uvloop
async def test_more_requests_at_once_than_allowed_may_be_sent_again() -> None:
    go_on = asyncio.Event()
    begun = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal begun
        begun += 1
        await go_on.wait()
        exchange.respond(200, [], b"ok")

    async with serving(handler, limits=Limits(streams=10)) as at, Client.to(at.port) as client:
        # At once, as by a client that has not read our settings.
        streams = [await client.begin() for _ in range(15)]
        late = [client.streams[stream] for stream in streams[10:]]
        await client.until(lambda: all(stream.reset is not None for stream in late))
        assert [stream.reset for stream in late] == [REFUSED_STREAM] * 5
        assert client.h2.remote_settings.max_concurrent_streams == 10
        go_on.set()
        for stream in streams[:10]:
            assert (await client.answer(stream)).body == b"ok"
        assert (await client.ask()).body == b"ok"
    assert begun == 11


@on_uvloop
async def test_a_client_that_says_good_bye_gets_what_it_asked_for() -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await go_on.wait()
        exchange.respond(200, [], b"ok")

    async with serving(handler) as at, Client.to(at.port) as client:
        stream = await client.begin()
        await client.raw(b"\0\0\x08\x07\0\0\0\0\0" + bytes(8))
        await client.raw(b"\0\0\x08\x06\0\0\0\0\0" + bytes(8))  # a ping, to see that it was read
        go_on.set()
        assert (await client.answer(stream)).body == b"ok"
        await client.gone()
    assert client.goaways == [(NO_ERROR, stream)]


@on_uvloop
async def test_draining() -> None:
    """What is under way is finished, what is on its way is served, then the connection ends."""
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if exchange.request.path == "/slow":
            await go_on.wait()
        exchange.respond(200, [], b"ok")

    async with serving(handler) as at, Client.to(at.port) as client, Client.to(at.port) as idle:
        await idle.ask()
        slow = await client.begin(path="/slow")
        await client.ask()
        drain = asyncio.create_task(at.server.drain(30))
        await client.until(lambda: client.goaways)
        assert client.goaways == [(NO_ERROR, 2**31 - 1)]
        late = await client.ask()  # sent before the good-bye was read, for all we know
        assert late.body == b"ok"
        await idle.gone()
        assert not drain.done()
        go_on.set()
        assert (await client.answer(slow)).body == b"ok"
        await client.gone()
        for one in (client, idle):
            one.writer.close()
        await drain
    assert [code for code, _ in client.goaways] == [NO_ERROR, NO_ERROR]
    assert idle.goaways[-1] == (NO_ERROR, 1)


@on_uvloop
async def test_closing_ends_handlers() -> None:
    ended = 0

    async def handler(_: Exchange) -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1

    async with serving(handler) as at, Client.to(at.port) as client:
        await client.begin()
        stream = await client.begin()
        await wait_until_async(lambda: at.server.connections, what="the connection")
        client.h2.reset_stream(stream)
        await client.flush()
        await client.ask("PRI")  # refused: all before it was read
        await at.server.close()
    assert ended == 2


@on_uvloop
async def test_an_idle_connection_is_closed_and_a_ping_is_no_request() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], b"ok")

    limits = Limits(keepalive_s=3)
    async with serving(handler, limits=limits) as at, Client.to(at.port) as client:
        assert (await client.ask()).body == b"ok"
        reading = asyncio.create_task(client.gone())
        while not reading.done():
            client.h2.ping(b"12345678")
            await client.flush()
            await asyncio.sleep(0.1)
    assert client.goaways == [(NO_ERROR, 1)]


@on_uvloop
async def test_what_a_client_never_takes_is_given_up() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.respond(200, [], b"x" * 200_000)

    limits = Limits(keepalive_s=3)
    async with serving(handler, limits=limits) as at, Client.to(at.port) as client:
        client.greedy = False
        answer = await client.ask()
    assert answer.reset == CANCEL
    assert len(answer.body) == 65_535
