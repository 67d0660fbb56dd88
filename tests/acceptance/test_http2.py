"""A customer over HTTP/2 and TLS: what is counted, refused, streamed and renewed, end to end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import httpx

from tests.acceptance.catalogue import config, plan
from tests.integration.proxy.raw import Peer, RawUpstream
from tests.support import wait_until
from tests.support.certificates import Files
from tests.support.h2 import Client
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber
from tests.support.wait import free_port, wait_until_async

PIECE = b"data: %d\n\n"


class Upstream:
    """Streams events one by one when told, takes uploads, and sends what it was sent back."""

    def __init__(self, port: int) -> None:
        self.go_on = asyncio.Event()
        self.peers = 0
        self.raw = RawUpstream(self.script, port)

    async def script(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            if request.path == "/s/events":
                await peer.send(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                    b"transfer-encoding: chunked\r\n\r\n"
                )
                for number in range(3):
                    piece = PIECE % number
                    await peer.send(b"%x\r\n%b\r\n" % (len(piece), piece))
                    await self.go_on.wait()
                    self.go_on.clear()
                await peer.send(b"0\r\nx-events: 3\r\n\r\n")
                continue
            framing = ",".join(request.get("transfer-encoding") + request.get("content-length"))
            note = f"x-framing: {framing}\r\nx-proto: {request.get('x-forwarded-proto')[0]}\r\n"
            note += f"x-trailers: {request.trailers}\r\n"
            if request.trailers:
                head = f"HTTP/1.1 200 OK\r\n{note}transfer-encoding: chunked\r\n\r\n"
                size = len(request.body)
                end = f"\r\n0\r\nx-size: {size}\r\nhost: a\r\n\r\n"
                await peer.send(f"{head}{size:x}\r\n".encode() + request.body + end.encode())
                continue
            head = f"HTTP/1.1 200 OK\r\n{note}content-length: {len(request.body)}\r\n\r\n"
            await peer.send(head.encode() + request.body)


def text(files: Files, port: int, streaming: int, pair: dict[str, str]) -> str:
    made = config(
        plan("sold", "monthly: {period: billing, limit: 60}\n      slots: {concurrency: 40}")
    )
    made = made.replace(
        "gateway:\n",
        f"gateway:\n  tls: {{listen: '127.0.0.1:{port}', cert: {pair['cert']}, "
        f"key: {pair['key']}}}\n",
    )
    made = made.replace(
        "upstreams:\n", f"upstreams:\n  live: {{urls: ['http://127.0.0.1:{streaming}']}}\n"
    )
    return made.replace("routes:\n", "routes:\n  - {match: {path: /s/*}, upstream: live}\n")


def test_a_customer_over_http2(own_stack: Callable[..., Stack]) -> None:
    with server_directory() as folder:
        files = Files(folder)
        port, streaming = free_port(), free_port()
        stack = own_stack(text(files, port, streaming, files.pair("gateway")), gateways=(2,))
        customer = stack.subscribe("sold")
        # As the plain listener is up, so is this one: they are opened together.
        asyncio.run(_serve(stack, customer, port, streaming, files.trusting(), files))
        stack.flushed(customer, 60)
        assert stack.state(customer)["requests"].total == 60


async def _serve(
    stack: Stack,
    customer: Subscriber,
    port: int,
    streaming: int,
    context: ssl.SSLContext,
    files: Files,
) -> None:
    upstream = Upstream(streaming)
    await upstream.raw.start()
    base = f"https://localhost:{port}"
    headers = {"authorization": f"Bearer {customer.key}", "x-who": customer.id}
    async with httpx.AsyncClient(
        verify=context, http1=False, http2=True, trust_env=False, timeout=30, base_url=base,
        headers=headers,
    ) as http:  # fmt: skip
        used = await _streaming(http, upstream)
        used += await _uploads(http)
        used += await _trailers(port, customer, files)
        used += await _at_once(http, stack, customer)
        await _renewed(http, stack, files)
        await _reloaded(http, stack, port, files)
        left = 60 - used
        answers = await asyncio.gather(*(http.get("/api/x") for _ in range(left + 15)))
        codes = [answer.status_code for answer in answers]
        assert (codes.count(200), codes.count(429)) == (left, 15)
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.http_version == "HTTP/2"
        assert refused.headers["x-ratelimit-remaining"] == "0"
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["type"]
        assert (await http.get("/nowhere")).status_code == 404
        assert (await http.get("/api/x", headers={"authorization": "no"})).status_code == 401
    await upstream.raw.stop()


async def _streaming(http: httpx.AsyncClient, upstream: Upstream) -> int:
    """Each event is there before the next one was sent."""
    async with http.stream("GET", "/s/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        pieces = answer.aiter_bytes()
        for number in range(3):
            assert await asyncio.wait_for(anext(pieces), 20) == PIECE % number
            upstream.go_on.set()
        assert [piece async for piece in pieces] == []
    return 1


async def _uploads(http: httpx.AsyncClient) -> int:
    """With a length and without, larger than any window."""
    body = bytes(range(256)) * 12_000

    async def pieces() -> Any:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    for content, framing in ((body, str(len(body))), (pieces(), "chunked"), (b"", "")):
        answer = await http.post("/s/echo", content=content)
        assert answer.status_code == 200
        assert answer.headers["x-framing"] in (framing, framing or "0")
        assert answer.headers["x-proto"] == "https"
        assert answer.content == (b"" if content == b"" else body)
    return 3


async def _at_once(http: httpx.AsyncClient, stack: Stack, customer: Subscriber) -> int:
    """Thirty requests on one connection are thirty at the upstream, and as many slots."""
    asked = [asyncio.create_task(http.get("/api/hold")) for _ in range(30)]
    seen = await asyncio.to_thread(
        lambda: wait_until(lambda: (s := stack.seen())["in_flight"] == 30 and s, what="all there")
    )
    assert seen["peak"][f"{customer.id} /api/hold"] == 30
    assert stack.leases(customer, "slots") == 30
    await asyncio.to_thread(stack.release)
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    return 30


async def _trailers(port: int, customer: Subscriber, files: Files) -> int:
    """There and back; and a call of gRPC, which is not charged."""
    key = [("authorization", f"Bearer {customer.key}")]
    async with Client.to(port, files.trusting("h2"), server_hostname="localhost") as client:
        stream = await client.begin("POST", "/s/echo", key, end=False)
        await client.send(stream, b"abc")
        client.h2.send_headers(stream, [("x-sum", "1"), ("x-forwarded-for", "1")], end_stream=True)
        await client.flush()
        answer = await client.answer(stream)
        assert (answer.status, answer.body) == (200, b"abc")
        assert answer.headers["x-trailers"] == "[('x-sum', '1')]"
        assert answer.trailers == {"x-size": "3"}
        grpc = [*key, ("content-type", "application/grpc"), ("te", "trailers")]
        answer = await client.ask("POST", "/api/Service/Call", grpc, b"12345")
        assert (answer.status, answer.headers["grpc-status"]) == (200, "12")
    return 1


async def _reloaded(http: httpx.AsyncClient, stack: Stack, port: int, files: Files) -> None:
    """A newer version of TLS is asked for; a file that is not there changes nothing."""
    old = files.trusting()
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    async def taken(context: ssl.SSLContext) -> bool:
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=30) as other:
            try:
                return (await other.get(f"https://localhost:{port}/-/healthz")).status_code == 200
            except httpx.TransportError:
                return False

    assert await taken(old)
    settings = stack.config.read_text()
    loads = "tallygate_config_reloads_total"
    before = stack.metric(loads, result="applied")
    stack.write_config(settings.replace("tls: {", "tls: {min_version: 1.3, "))
    await wait_until_async(lambda: stack.metric(loads, result="applied") >= before + 3, what="all")
    assert not await taken(old)
    assert await taken(files.trusting())
    stack.write_config(settings.replace("gateway.crt", "nowhere.crt"))
    await wait_until_async(lambda: stack.metric(loads, result="refused") == 2, what="both workers")
    assert not await taken(old)
    assert (await http.get("/-/healthz")).status_code == 200  # the connection of before


async def _renewed(http: httpx.AsyncClient, stack: Stack, files: Files) -> None:
    """A new certificate in every worker, without a signal; the open connection stays."""
    files.pair("gateway")
    name = "tallygate_certificate_reloads_total"
    await wait_until_async(lambda: stack.metric(name, result="applied") == 2, what="both workers")
    assert stack.metric("tallygate_certificate_expiry_timestamp_seconds") > 0
    assert (await http.get("/-/healthz")).status_code == 200
