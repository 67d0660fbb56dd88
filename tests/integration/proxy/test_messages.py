"""What is relayed arrives as it was sent: methods, framing, headers, bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from gateway.proxy.relay import INLINE_BODY
from tests.integration.proxy.conftest import GatewayFactory
from tests.integration.proxy.raw import Peer, Request, answering, ok, on_loop


@on_loop
async def test_a_get_arrives_with_its_path_byte_for_byte(gateway: GatewayFactory) -> None:
    seen: list[Request] = []
    async with gateway(answering(ok(b"hello"), requests=seen)) as relay:
        answer = await relay.ask("GET /a%2Fb/%7e%C3%A9?q=%20+&api_key=s3cret&r", "X-Api-Key: s3")
        url = relay.upstream.url.removeprefix("http://")

    assert (answer.status, answer.body) == (200, b"hello")
    assert answer.get("x-tallygate") == ["yes"]
    assert seen[0].path == "/a%2Fb/%7e%C3%A9?q=%20+&r"
    assert seen[0].get("host") == [url]
    assert seen[0].get("x-forwarded-host") == ["api.example"]
    assert seen[0].get("x-forwarded-for") == ["127.0.0.1"]
    assert not seen[0].get("x-api-key")


@pytest.mark.parametrize(
    ("line", "hosts", "seen"),
    [
        ("GET http://target.example/x", ["Host: target.example"], "target.example"),
        ("GET http://target.example:80/x", ["Host: Target.example"], "Target.example"),
        ("GET http://target.example/x", ["Host: api.example"], None),
        ("GET http://target.example/x", [], None),
        ("GET http://target.example/x", ["Host: a", "Host: a"], None),
        ("GET /x", [], None),
        ("GET /x", ["Host:"], None),
        ("GET /x", ["Host: a", "Host: a"], None),
        ("GET /x", ["Host: a", "Host: b"], None),
    ],
)
@on_loop
async def test_one_host_a_request(
    line: str, hosts: list[str], seen: str | None, gateway: GatewayFactory
) -> None:
    requests: list[Request] = []
    async with gateway(answering(ok(), requests=requests)) as relay, relay.client() as client:
        await client.send("\r\n".join([f"{line} HTTP/1.1", *hosts, "", ""]).encode())
        answer = await client.answer()
    if seen is None:
        assert answer.status == 400
        assert not requests
    else:
        assert requests[0].path == "/x"
        assert requests[0].get("x-forwarded-host") == [seen]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@on_loop
async def test_methods_with_and_without_a_body(method: str, gateway: GatewayFactory) -> None:
    seen: list[Request] = []
    async with gateway(answering(ok(), requests=seen)) as relay, relay.client() as client:
        await client.ask(f"{method} /x", body=b"some body")
        answer = await client.ask(f"{method} /y")

    assert answer.body == b"ok"
    assert [(r.method, r.path, r.body) for r in seen] == [
        (method, "/x", b"some body"),
        (method, "/y", b""),
    ]
    assert relay.upstream.connections == 1


@on_loop
async def test_head_with_a_length_does_not_wait_for_a_body(gateway: GatewayFactory) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"
    async with gateway(answering(head)) as relay, relay.client() as client:
        first = await client.ask("HEAD /x")
        second = await client.ask("HEAD /x")

    assert first.get("content-length") == ["1234"]
    assert second.status == 200
    assert relay.upstream.connections == 1, "the connection is reusable after HEAD"


@on_loop
async def test_a_get_after_a_head_on_the_same_connection(gateway: GatewayFactory) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    async with gateway(answering(head, ok(b"body"))) as relay, relay.client() as client:
        await client.ask("HEAD /x")
        answer = await client.ask("GET /x")

    assert answer.body == b"body"
    assert relay.upstream.connections == 1


@on_loop
async def test_a_body_in_answer_to_head_never_reaches_the_next_request(
    gateway: GatewayFactory,
) -> None:
    wrong = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    async with gateway(answering(wrong)) as relay, relay.client() as client:
        await client.ask("HEAD /x")
        answer = await client.ask("HEAD /y")

    assert answer.status == 200
    assert relay.upstream.connections == 2


@pytest.mark.parametrize("status", [204, 304])
@on_loop
async def test_statuses_without_a_body(status: int, gateway: GatewayFactory) -> None:
    bare = f"HTTP/1.1 {status} X\r\ncontent-length: 7\r\netag: x\r\n\r\n".encode()
    async with gateway(answering(bare)) as relay, relay.client() as client:
        first = await client.ask("GET /x")
        second = await client.ask("GET /x")

    assert [first.status, second.status] == [status, status]
    assert second.get("etag") == ["x"]
    assert relay.upstream.connections == 1


@on_loop
async def test_trailers_of_an_answer_go_to_who_takes_them(gateway: GatewayFactory) -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
        b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\n"
        b"X-Sum: 1\r\ncontent-type: a/b\r\nset-cookie: a=b\r\n\r\n"
    )
    async with gateway(answering(chunked)) as relay, relay.client() as client:
        for headers, trailers in [((), []), (["TE: trailers"], [("x-sum", "1")])] * 2:
            answer = await client.ask("GET /x", *headers)
            assert answer.body == b"hello world"
            assert not answer.get("x-sum")
            assert not answer.get("trailer")
            assert answer.trailers == trailers
    assert relay.upstream.connections == 1


@on_loop
async def test_trailers_of_a_streamed_answer(gateway: GatewayFactory) -> None:
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await go_on.wait()
        await peer.send(b"0\r\nx-sum: 1\r\n\r\n")

    async with gateway(script) as relay, relay.client() as client:
        await client.send(client.head("GET /x", "TE: trailers"))
        head = await client.answer_head()
        chunks = client.chunks()
        first = await anext(chunks)
        go_on.set()
        rest = [chunk async for chunk in chunks]
    assert (head.status, first, rest, client.trailers) == (200, b"a", [], [("x-sum", "1")])


@on_loop
async def test_trailer_fields_without_end_break_the_answer_off(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        await peer.send(b"x-more: 1\r\n" * 1000)
        await peer.gone()

    async with gateway(script) as relay:
        answer = await relay.ask("GET /x")
    assert answer.status == 502 or not answer.clean


@on_loop
async def test_a_body_that_ends_with_the_connection(gateway: GatewayFactory) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil ")
        await peer.send(b"close")

    async with gateway(script) as relay:
        answer = await relay.ask("GET /x")
    assert (answer.body, answer.clean) == (b"until close", True)


@on_loop
async def test_interim_responses_are_skipped(gateway: GatewayFactory) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    async with gateway(answering(b"HTTP/1.1 100 Continue\r\n\r\n" + early + ok())) as relay:
        answer = await relay.ask("GET /x")
    assert (answer.status, answer.body) == (200, b"ok")
    assert not answer.get("link")


@on_loop
async def test_expect_continue_is_answered_by_the_gateway(gateway: GatewayFactory) -> None:
    seen: list[Request] = []
    async with gateway(answering(ok(), requests=seen)) as relay, relay.client() as client:
        await client.send(client.head("POST /x", "Expect: 100-continue", length=4))
        assert (await client.answer_head()).status == 100
        await client.send(b"body")
        answer = await client.answer()
    assert answer.status == 200
    assert seen[0].body == b"body"
    assert not seen[0].get("expect")


@on_loop
async def test_headers_keep_order_and_duplicates_hop_by_hop_go(gateway: GatewayFactory) -> None:
    seen: list[Request] = []
    extra = (
        "set-cookie: a=1",
        "set-cookie: b=2",
        "connection: keep-alive, x-hop",
        "x-hop: 1",
        "keep-alive: timeout=5",
        "proxy-authenticate: Basic",
        "upgrade: h2c",
        "x-drop-me: 1",
        "x-empty:",
        "server: theirs",
    )
    async with gateway(answering(ok(b"ok", *extra), requests=seen)) as relay:
        answer = await relay.ask(
            "GET /x",
            "Connection: close, X-Secret",
            "X-Secret: 1",
            "X-Kept: 1",
            "Proxy-Authorization: x",
            "Te: trailers",
        )

    names = [name for name, _ in answer.headers]
    assert answer.get("set-cookie") == ["a=1", "b=2"]
    assert answer.get("server") == ["theirs"]
    for gone in ("x-hop", "keep-alive", "proxy-authenticate", "upgrade", "x-drop-me"):
        assert gone not in names
    received = [name for name, _ in seen[0].headers]
    assert "x-kept" in received
    for gone in ("connection", "x-secret", "proxy-authorization", "te"):
        assert gone not in received


@on_loop
async def test_chunked_requests_stay_chunked(gateway: GatewayFactory) -> None:
    seen: list[Request] = []
    trailers = b"x-trailer: 1\r\nx-forwarded-for: 10.0.0.1\r\nhost: elsewhere\r\n\r\n"
    async with gateway(answering(ok(), requests=seen)) as relay, relay.client() as client:
        await client.send(client.head("POST /x", "Transfer-Encoding: chunked"))
        for piece in (b"3\r\nabc\r\n", b"4\r\ndefg\r\n", b"0\r\n" + trailers):
            await client.send(piece)
        answer = await client.answer()
        again = await client.ask("GET /y")

    assert (answer.status, again.status) == (200, 200)
    assert seen[0].body == b"abcdefg"
    assert seen[0].get("transfer-encoding") == ["chunked"]
    assert seen[0].trailers == [("x-trailer", "1")]
    assert relay.upstream.connections == 1


@pytest.mark.parametrize("size", [10, INLINE_BODY + 10])
@on_loop
async def test_trailers_of_a_request_that_may_follow_a_body(
    size: int, gateway: GatewayFactory
) -> None:
    seen: list[Request] = []
    async with gateway(answering(ok(), requests=seen)) as relay, relay.client() as client:
        await client.send(client.head("POST /x", "Transfer-Encoding: chunked"))
        await client.send(b"%x\r\n%b\r\n0\r\n" % (size, b"a" * size))
        await client.send(b"X-Sum: 1\r\nAuthorization: a\r\nX-Forwarded-For: 1.1.1.1\r\n\r\n")
        answer = await client.answer()
    assert answer.status == 200
    assert (len(seen[0].body), seen[0].trailers) == (size, [("x-sum", "1")])


@on_loop
async def test_length_and_chunked_together_never_reach_the_upstream_both(
    gateway: GatewayFactory,
) -> None:
    seen: list[Request] = []
    async with gateway(answering(ok(), requests=seen)) as relay, relay.client() as client:
        await client.send(client.head("POST /x", "Transfer-Encoding: chunked", length=5))
        await client.send(b"3\r\nabc\r\n0\r\n\r\n")
        answer = await client.answer()
    if answer.status == 200:
        assert not seen[0].get("content-length")
        assert seen[0].body == b"abc"
    else:
        assert answer.status == 400
        assert not seen


@pytest.mark.parametrize("size", [1, 65_536, 65_537, 3_000_000])
@on_loop
async def test_bodies_of_all_sizes_both_ways(size: int, gateway: GatewayFactory) -> None:
    async def echo(peer: Peer) -> None:
        while True:
            await peer.send(ok((await peer.request()).body))

    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    async with gateway(echo) as relay, relay.client() as client:
        for _ in range(2):
            answer = await client.ask("POST /x", body=body)
            assert answer.body == body
    assert relay.upstream.connections == 1


@on_loop
async def test_events_arrive_one_by_one(gateway: GatewayFactory) -> None:
    """A head without body, then each piece, reach the client before the next is made."""
    taken = asyncio.Semaphore(0)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(3):
            await taken.acquire()
            await peer.send(b"1\r\n%d\r\n" % number)
        await taken.acquire()
        await peer.send(b"0\r\n\r\n")

    async with gateway(script) as relay, relay.client() as client:
        await client.send(client.head("GET /x"))
        assert (await client.answer_head()).status == 200
        taken.release()
        pieces = []
        async for piece in client.chunks():
            pieces.append(piece)
            taken.release()
    assert pieces == [b"0", b"1", b"2"]


def split(data: bytes) -> Callable[[Peer], object]:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            for byte in data:
                await peer.send(bytes((byte,)))
                await asyncio.sleep(0)

    return script


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ],
)
@on_loop
async def test_an_answer_in_single_bytes(answer: bytes, gateway: GatewayFactory) -> None:
    async with gateway(split(answer)) as relay, relay.client() as client:
        assert (await client.ask("GET /x")).body == b"hello"
        assert (await client.ask("GET /x")).body == b"hello"


@on_loop
async def test_trailers_of_an_answer_are_passed_on(gateway: GatewayFactory) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
    body = b"2\r\nok\r\n0\r\nx-sum: 7\r\nset-cookie: a=1\r\n\r\n"
    async with gateway(answering(head + body)) as relay, relay.client() as client:
        for _ in range(2):
            await client.send(client.head("GET /x", "TE: trailers"))
            answer = await client.answer_head()
            raw = await client.reader.readuntil(b"0\r\n")
            ended = await client.reader.readuntil(b"\r\n\r\n")
            assert answer.get("transfer-encoding") == ["chunked"]
            assert b"2\r\nok\r\n" in raw
            assert ended == b"x-sum: 7\r\n\r\n"
    assert relay.upstream.connections == 1
