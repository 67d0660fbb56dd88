"""What an application may answer that must not reach a client as it is; and trusted proxies."""

from __future__ import annotations

import pytest

from tests.hardening.check import World
from tests.hardening.rows import req
from tests.support.http1 import Connection, ask

_OK = b"HTTP/1.1 200 OK\r\n%bcontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    "fields",
    [
        b"X-A: b\nSet-Cookie: evil=1\r\n",
        b"X-A: b\rSet-Cookie: evil=1\r\n",
        b"X-A: b\r\rSet-Cookie: evil=1\r\n",
        b"X-A: b\x00Set-Cookie: evil=1\r\n",
        b"X-A: b\x01\r\n",
        b"X-A: b\x7f\r\n",
        b"X-A: b\r\n Set-Cookie: evil=1\r\n",
        b"X A: evil\r\n",
        b"X-A : evil\r\n",
        b": evil\r\n",
        b"X-A\x00: evil\r\n",
        b"X\xe9: evil\r\n",
        b"evil\r\n",
        b"Transfer-Encoding : chunked\r\nX: evil\r\n",
    ],
)
def test_an_answer_that_would_split_is_not_passed_on(world: World, fields: bytes) -> None:
    world.recorder.answers["/split"] = _OK % fields
    counted = world.counted()
    with Connection(world.port) as connection:
        answer = connection.exchange(world.good(path="/split"))
        assert answer.status == 502
        assert b"evil" not in answer.body
        assert not answer.get("set-cookie")
        assert connection.exchange(world.good()).status == 200
    assert world.counted() - counted == 2


def test_fields_of_an_answer_that_are_ours(world: World) -> None:
    theirs = (
        b"X-Request-Id: evil\r\nRateLimit: evil\r\nRateLimit-Policy: evil\r\n"
        b"X-RateLimit-Limit: 0\r\n"
        b"Connection: x-hop, X-Kept-Not\r\nX-Hop: evil\r\nX-Kept-Not: evil\r\n"
        b"Keep-Alive: timeout=1\r\n"
        b"Proxy-Authenticate: evil\r\nUpgrade: h2c\r\nTE: evil\r\nTrailer: evil\r\nX-End: 1\r\n"
    )
    world.recorder.answers["/ours"] = _OK % theirs
    answer = ask(world.port, world.good(path="/ours"))
    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.get("x-end") == ["1"]
    assert not any(b"evil" in value for _, value in answer.fields)
    assert not answer.get("upgrade")
    assert not answer.get("keep-alive")
    for name in ("x-request-id", "ratelimit", "ratelimit-policy", "x-ratelimit-limit", "date"):
        assert len(answer.get(name)) == 1, name


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize(
    "framing", [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b""]
)
def test_no_body_where_none_is_allowed(world: World, status: int, framing: bytes) -> None:
    world.recorder.answers["/none"] = b"HTTP/1.1 %d X\r\n%b\r\nhello" % (status, framing)
    with Connection(world.port) as connection:
        answer = connection.exchange(world.good(path="/none"))
        assert answer.status == status
        assert not answer.get("transfer-encoding")
        assert status == 304 or not answer.get("content-length")
        assert connection.exchange(world.good()).status == 200


@pytest.mark.parametrize("target", [b"/echo%0d%0aX-Evil:1", b"/echo?%0d%0aSet-Cookie:evil"])
def test_what_is_repeated_in_a_refusal_cannot_split_it(world: World, target: bytes) -> None:
    raw = req(b"GET %b HTTP/1.1" % target, b"X-Request-Id: a%0d%0aX-Evil:1", key=None)
    answer = ask(world.port, world.fill(raw))
    assert answer.status in (400, 401)
    assert not answer.get("x-evil")
    assert answer.get("x-request-id") == ["a%0d%0aX-Evil:1"]


def _forwarded(world: World, source: str, *fields: bytes) -> dict[str, list[str]]:
    with Connection(world.port, source=source) as connection:
        answer = connection.exchange(world.fill(req(b"GET /echo HTTP/1.1", *fields)))
    assert answer.status == 200
    seen = world.recorder.requests[-1]
    names = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded")
    return {name: seen.get(name) for name in names}


def test_a_trusted_proxy_is_believed_and_continued(world: World) -> None:
    found = _forwarded(
        world, "127.0.0.2",
        b"X-Forwarded-For: 203.0.113.7, 198.51.100.1", b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: shop.example",
    )  # fmt: skip
    assert found["x-forwarded-for"] == ["203.0.113.7, 198.51.100.1, 127.0.0.2"]
    assert found["x-forwarded-proto"] == ["https"]
    assert found["x-forwarded-host"] == ["shop.example"]
    continued = _forwarded(world, "127.0.0.2", b"Forwarded: for=203.0.113.7;proto=https")
    assert continued["forwarded"] == ["for=203.0.113.7;proto=https, for=127.0.0.2;proto=http"]
    assert continued["x-forwarded-for"] == ["203.0.113.7, 127.0.0.2"]


def test_a_neighbour_of_a_trusted_proxy_is_not_believed(world: World) -> None:
    found = _forwarded(
        world, "127.0.0.3", b"X-Forwarded-For: 203.0.113.7", b"Forwarded: for=1.1.1.1"
    )
    assert found["x-forwarded-for"] == ["127.0.0.3"]
    assert found["forwarded"] == []


@pytest.mark.parametrize(
    ("claim", "client"),
    [
        (b"203.0.113.7", "203.0.113.7"),
        (b"1.1.1.1, 203.0.113.7", "203.0.113.7"),  # the first was written by the client itself
        (b"203.0.113.8, 127.0.0.2", "203.0.113.8"),
        (b"nonsense", "127.0.0.2"),
    ],
)
def test_who_is_limited_behind_a_trusted_proxy(world: World, claim: bytes, client: str) -> None:
    """On a keyless route each address has a plan of its own."""
    raw = req(b"GET /public/x HTTP/1.1", b"X-Forwarded-For: " + claim, key=None)
    with Connection(world.port, source="127.0.0.2") as connection:
        assert connection.exchange(world.fill(raw)).status == 200
    from core.keyspace import Keyspace

    assert world.stack.redis.exists(Keyspace().state(f"ip:anonymous:{client}"))
