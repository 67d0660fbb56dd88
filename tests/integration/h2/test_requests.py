"""What is asked over HTTP/2, as a handler sees it; what is no request, and what it costs."""

from __future__ import annotations

import contextlib
from typing import Any

import httptools
import httpx
import pytest

from gateway.http.errors import ClientDisconnected
from gateway.http.exchange import Exchange
from gateway.http.h2_request import METHODS
from gateway.http.server import Limits
from tests.support.h2 import Client, Fields, on_uvloop, serving
from tests.support.wait import wait_until_async

GOOD: Fields = (
    (":method", "GET"),
    (":scheme", "http"),
    (":authority", "api.example"),
    (":path", "/a"),
)


async def hello(exchange: Exchange) -> None:
    exchange.respond(200, [], b"hello")


class Keep:
    """A handler that keeps requests with their bodies, and answers 200."""

    def __init__(self) -> None:
        self.seen: list[tuple[Exchange, bytes]] = []

    async def __call__(self, exchange: Exchange) -> None:
        pieces = []
        while piece := await exchange.read():
            pieces.append(piece)
        self.seen.append((exchange, b"".join(pieces)))
        exchange.respond(200, [(b"content-type", b"text/plain")], b"ok")


@on_uvloop
async def test_a_request_as_a_handler_sees_it() -> None:
    keep = Keep()
    async with (
        serving(keep) as at,
        httpx.AsyncClient(http1=False, http2=True, trust_env=False) as http,
    ):
        answer = await http.post(
            f"http://127.0.0.1:{at.port}/a%2Fb/c?x=1&y=%20",
            headers=[("x-a", "1"), ("x-a", "2"), ("cookie", "a=1"), ("cookie", "b=2")],
            content=b"body",
        )
    exchange, body = keep.seen[0]
    request = exchange.request
    assert (answer.http_version, answer.status_code, answer.text) == ("HTTP/2", 200, "ok")
    assert (request.method, request.version, request.scheme) == ("POST", "2", "http")
    assert (request.raw_path, request.path) == (b"/a%2Fb/c", "/a/b/c")
    assert request.query == b"x=1&y=%20"
    assert request.peer == "127.0.0.1"
    assert request.headers[0] == (b"host", f"127.0.0.1:{at.port}".encode())
    assert [value for name, value in request.headers if name == b"x-a"] == [b"1", b"2"]
    assert request.header(b"cookie") == b"a=1; b=2"
    assert (request.body_length, body) == (4, b"body")


@on_uvloop
async def test_a_body_without_length_and_its_trailers() -> None:
    keep = Keep()
    async with serving(keep) as at, Client.to(at.port) as client:
        stream = await client.begin("POST", end=False)
        await client.send(stream, b"abc")
        client.h2.send_headers(stream, [("x-sum", "3")], end_stream=True)
        await client.flush()
        assert (await client.answer(stream)).status == 200
    exchange, body = keep.seen[0]
    assert (exchange.request.body_length, body) == (-1, b"abc")
    assert list(exchange.trailers) == [(b"x-sum", b"3")]


def changed(**fields: str | None) -> Fields:
    """A good block with other pseudo-header fields, or without (None)."""
    pairs = dict(GOOD) | {f":{name}": value for name, value in fields.items()}
    return [(name, value) for name, value in pairs.items() if value is not None]


@pytest.mark.parametrize(
    ("block", "status"),
    [
        (changed(path=None), 400),
        (changed(path=""), 400),
        (changed(path="a"), 400),
        (changed(path="*"), 400),
        (changed(path="http://api.example/a"), 400),
        (changed(path="/a b"), 400),
        (changed(path="/a#b"), 400),
        (changed(path="/a HTTP/1.1\r\nx: y"), 400),
        (changed(method=None), 400),
        (changed(scheme=None), 400),
        (changed(scheme="ftp"), 400),
        (changed(authority=None), 400),
        (changed(authority=""), 400),
        (changed(authority="user@api.example"), 400),
        (changed(authority="a b"), 400),
        (changed(method="BREW"), 501),
        (changed(method="get"), 501),
        (changed(method="GET / HTTP/1.1\r\n"), 501),
        ([(":method", "CONNECT"), (":authority", "a:80")], 501),
        (changed(method="CONNECT", protocol="websocket"), 501),
        (changed(path="/" + "a" * 3000), 414),
        ([*GOOD, *((f"x-{n}", "1") for n in range(200))], 431),
        ([*GOOD, ("x-long", "a" * 9000)], 431),
        ([*GOOD, ("X-Upper", "1")], 400),
        ([*GOOD, ("x y", "1")], 400),
        ([*GOOD, ("", "1")], 400),
        ([*GOOD, ("x-a", "1\r\nx-b: 2")], 400),
        ([*GOOD, ("x-a", "1\0")], 400),
        ([*GOOD, ("x-a", " 1")], 400),
        ([*GOOD, ("x-a", "1\t")], 400),
        ([*GOOD, ("x-a", "1"), (":path", "/b")], 400),
        ([*GOOD, (":path", "/b")], 400),
        ([*GOOD, (":status", "200")], 400),
        ([*GOOD, ("connection", "close")], 400),
        ([*GOOD, ("keep-alive", "1")], 400),
        ([*GOOD, ("proxy-connection", "close")], 400),
        ([*GOOD, ("transfer-encoding", "chunked")], 400),
        ([*GOOD, ("upgrade", "websocket")], 400),
        ([*GOOD, ("te", "gzip")], 400),
        ([*GOOD, ("host", "other.example")], 400),
        ([*GOOD, ("expect", "100-continue"), ("expect", "more")], 417),
        ([*GOOD, ("content-length", "0"), ("content-length", "0")], 400),
    ],
)
@on_uvloop
async def test_what_is_no_request_costs_its_stream_only(block: Any, status: int) -> None:
    limits = Limits(head=8192, target=2048, fields=100)
    async with serving(hello, limits=limits) as at, Client.to(at.port) as client:
        bad = await client.begin(block=block)
        good = await client.begin()
        refused, answer = await client.answer(bad), await client.answer(good)
    assert refused.status == status
    assert answer.body == b"hello"
    assert at.refused.total() == 1
    assert not client.goaways


@pytest.mark.parametrize(
    "block",
    [
        [*GOOD, ("te", "trailers")],
        [*GOOD, ("host", "API.example")],
        [*changed(authority=None), ("host", "api.example")],
        [*GOOD, ("x-empty", "")],
        [*GOOD, ("x-text", "a\tb\xe9")],
        changed(method="OPTIONS", path="*"),
        changed(scheme="https"),
        changed(authority="[::1]:80"),
    ],
)
@on_uvloop
async def test_what_is_unusual_but_right(block: Any) -> None:
    async with serving(hello) as at, Client.to(at.port) as client:
        assert (await client.answer(await client.begin(block=block))).status == 200


@pytest.mark.parametrize("lengths", [["4"], ["2"], ["x"], ["3", "4"], ["-3"]])
@on_uvloop
async def test_a_length_that_is_not_the_bodys_ends_the_connection(lengths: list[str]) -> None:
    keep = Keep()
    async with serving(keep) as at, Client.to(at.port) as client:
        stream = await client.begin(
            "POST", headers=[("content-length", length) for length in lengths], end=False
        )
        with contextlib.suppress(ConnectionError):
            await client.send(stream, b"abc", end=True)
        await client.gone()
    assert [code for code, _ in client.goaways] == [1]
    assert not keep.seen
    assert at.events == {"h2_protocol": 1}


@on_uvloop
async def test_bad_trailers_are_a_bad_request() -> None:
    caught: list[str] = []

    async def handler(exchange: Exchange) -> None:
        try:
            while await exchange.read():
                pass
        except Exception as error:
            caught.append(type(error).__name__)
            exchange.respond(400, [])

    async with serving(handler) as at, Client.to(at.port) as client:
        for trailer in [("X-Upper", "1"), (":path", "/"), ("connection", "x"), ("x", "\n")]:
            stream = await client.begin("POST", end=False)
            await client.send(stream, b"abc")
            client.h2.send_headers(stream, [trailer], end_stream=True)
            await client.flush()
            assert (await client.answer(stream)).status == 400
    assert caught == ["BadRequest"] * 4


@on_uvloop
async def test_who_expects_to_be_told_is_told_once_the_body_is_read() -> None:
    async with serving(Keep()) as at, Client.to(at.port) as client:
        stream = await client.begin("PUT", headers=[("expect", "100-continue")], end=False)
        await client.until(lambda: client.streams[stream].interim)
        await client.send(stream, b"abc", end=True)
        answer = await client.answer(stream)
    assert (answer.interim, answer.status) == ([100], 200)


@pytest.mark.parametrize("how", ["reset", "abort"])
@on_uvloop
async def test_a_client_that_goes_is_noticed(how: str) -> None:
    gone: list[str] = []
    started: list[Exchange] = []

    async def handler(exchange: Exchange) -> None:
        exchange.on_gone = lambda: gone.append(exchange.request.path)
        started.append(exchange)
        try:
            while await exchange.read():
                pass
        except ClientDisconnected:
            gone.append("read")
        exchange.respond(200, [], b"too late")

    async with serving(handler) as at, Client.to(at.port) as client:
        stream = await client.begin("POST", "/x", end=False)
        await wait_until_async(lambda: started, what="the handler")
        if how == "reset":
            client.h2.reset_stream(stream)
            await client.flush()
        else:
            client.writer.transport.abort()
        await wait_until_async(lambda: len(gone) == 2, what="both notices")
        if how == "reset":
            assert (await client.ask("GET", "/y", body=b"x")).status == 200
        await wait_until_async(lambda: how == "reset" or not at.server.connections, what="the end")
    assert gone == ["/x", "read"]
    assert started[0].gone


@on_uvloop
async def test_grpc_is_told_plainly_and_grpc_web_is_just_http() -> None:
    keep = Keep()
    async with serving(keep) as at, Client.to(at.port) as client:
        for kind in ("application/grpc", "application/grpc+proto", "Application/gRPC;x=1"):
            stream = await client.begin("POST", "/a.B/C", [("content-type", kind)], end=False)
            answer = await client.answer(stream)
            assert (answer.status, answer.headers["grpc-status"]) == (200, "12")
            assert "gRPC" in answer.headers["grpc-message"]
            assert answer.body == b""
        web = await client.ask("POST", "/a.B/C", [("content-type", "application/grpc-web")], b"x")
    assert web.headers.get("grpc-status") is None
    assert len(keep.seen) == 1
    assert at.events == {"grpc": 3}


@on_uvloop
async def test_http_1_on_the_same_port_however_it_is_cut() -> None:
    async with serving(hello) as at:
        for text in (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"PRINT / HTTP/1.1\r\nhost: a\r\n\r\n"):
            for size in (1, 3, 1000):
                async with Client.to(at.port, hello=False) as client:
                    for start in range(0, len(text), size):
                        await client.raw(text[start : start + size])
                    line = await client.reader.readline()
                    status = b"501" if text.startswith(b"PRINT") else b"200"
                    assert line.split(b" ")[1] == status


def test_methods_are_those_of_http_1() -> None:
    class Ignore:
        pass

    words = METHODS | {b"BREW", b"PRI", b"DESCRIBE", b"FLUSH"}
    known = set()
    for word in words:
        with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
            parser = httptools.HttpRequestParser(Ignore())
            target = b"a:80" if word == b"CONNECT" else b"/"
            parser.feed_data(word + b" " + target + b" HTTP/1.1\r\nhost: a\r\n")
            known.add(word)
    assert known == METHODS
