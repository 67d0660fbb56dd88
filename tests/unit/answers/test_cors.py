"""The fields that let a page read an answer, by origin."""

from __future__ import annotations

import pytest

from core.rules import Cors
from gateway.answers.cors import REPLACED, CorsRules, asked_method
from gateway.http.message import Request

Pair = tuple[bytes, bytes]
KEYS = ("authorization", "x-api-key")


def rules(*origins: str, headers: tuple[str, ...] = (), credentials: bool = False) -> CorsRules:
    cors = Cors(origins, ("GET", "PUT"), headers, ("x-total",), credentials, 600)
    return CorsRules(cors, KEYS)


def request(origin: str = "", *headers: Pair, method: str = "GET") -> Request:
    named = [(b"origin", origin.encode())] if origin else []
    return Request(method, b"/x", [*named, *headers])


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://app.example.com", True),
        ("HTTPS://APP.example.com", True),
        ("http://app.example.com", False),
        ("https://app.example.com:8443", False),
        ("https://app.example.com.evil.example", False),
        ("https://a.apps.example.com", True),
        ("https://a.b.apps.example.com", True),
        ("https://apps.example.com", False),
        ("https://evilapps.example.com", False),
        ("https://evil.example/.apps.example.com", False),
        ("https://evil.example:1.apps.example.com", False),
        ("https://.apps.example.com", False),
        ("https://user@x.apps.example.com", False),
        ("null", False),
        ("", False),
    ],
)
def test_origins(origin: str, allowed: bool) -> None:
    cors = rules("https://app.example.com", "https://*.apps.example.com")
    assert cors.allowed(origin.encode()) == allowed
    fields = dict(cors.fields(request(origin)))
    assert fields.get(b"access-control-allow-origin") == (origin.encode() if allowed else None)
    assert fields[b"vary"] == b"origin", "a cache must not give one origin the answer of another"


def test_everybody() -> None:
    fields = dict(rules("*").fields(request("https://any.example")))
    assert fields[b"access-control-allow-origin"] == b"*"
    assert b"vary" not in fields
    assert b"access-control-allow-credentials" not in fields


def test_what_a_page_may_read() -> None:
    exposed = dict(rules("*").fields(request()))[b"access-control-expose-headers"].split(b", ")
    assert {b"ratelimit", b"ratelimit-policy", b"retry-after", b"x-request-id", b"x-total"} <= {
        *exposed
    }
    assert set(dict(rules("*", credentials=True).fields(request()))) <= REPLACED


def test_a_preflight() -> None:
    cors = rules("https://app.example.com", credentials=True)
    assert dict(cors.preflight(request("https://app.example.com"))) == {
        b"access-control-allow-origin": b"https://app.example.com",
        b"access-control-allow-credentials": b"true",
        b"access-control-allow-methods": b"GET, PUT",
        b"access-control-allow-headers": b"authorization, x-api-key, content-type, x-request-id",
        b"access-control-max-age": b"600",
        b"vary": b"origin, access-control-request-method, access-control-request-headers",
    }
    assert [name for name, _ in cors.preflight(request("https://evil.example"))] == [b"vary"]


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [(b"X-One, x-two", b"X-One, x-two"), (b"x-one\x0bx", None), (b"x" * 3000, None), (b"", None)],
)
def test_all_headers_are_those_asked_for(asked: bytes, allowed: bytes | None) -> None:
    headers = [(b"access-control-request-headers", asked)] if asked else []
    fields = dict(rules("*", headers=("*",)).preflight(request("https://a.example", *headers)))
    assert fields.get(b"access-control-allow-headers") == allowed


def test_what_is_a_preflight() -> None:
    asks = (b"access-control-request-method", b"PUT")
    assert asked_method(request("https://a.example", asks, method="OPTIONS")) == "PUT"
    assert asked_method(request("https://a.example", method="OPTIONS")) == ""
    assert asked_method(request("", asks, method="OPTIONS")) == ""
    assert asked_method(request("https://a.example", asks)) == ""
