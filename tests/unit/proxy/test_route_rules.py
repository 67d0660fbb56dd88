"""What a configured route lets through to its upstream, and back."""

from __future__ import annotations

import pytest

from core.config import loads
from gateway.auth.extract import KeyExtractor
from gateway.http.message import Request
from gateway.runtime import Runtime

CONFIG = """
gateway: {key: {headers: [authorization, x-api-key, x-tg], query: "key[]"}}
upstreams: {api: {urls: ["http://127.0.0.1:9"]}}
plans: {free: {limits: {rate: {rate: 5/s}}}}
routes:
  - {match: {path: /keyed}, upstream: api}
  - {match: {path: /open}, upstream: api, keyless: true, plan: free}
  - {match: {path: /passed}, upstream: api, forward_key: true}
"""
RUNTIME = Runtime(loads(CONFIG), {})
EXTRACTOR = KeyExtractor(("authorization", "x-api-key", "x-tg"), "key[]")
OURS = b"tg_live_abcdef"
OTHER = b"tg_live_ghijkl"
CARRIERS = (b"authorization", b"x-api-key", b"x-tg")

Pair = tuple[bytes, bytes]


def upstream(path: str, *headers: Pair, query: bytes = b"") -> tuple[list[Pair], bytes]:
    """The fields that may hold keys and the path, as the upstream gets them."""
    target = path.encode() + (b"?" + query if query else b"")
    request = Request("GET", target, [(b"host", b"h"), *headers], peer="192.0.2.1")
    route = RUNTIME.router.match(path, "GET", "h")
    assert route is not None
    source = None if route.route.keyless else EXTRACTOR.extract(headers, query)[1]
    head = route.rules(source).head(request)
    lines = [line.partition(b": ") for line in head.fields.split(b"\r\n")]
    return [(name, value) for name, _, value in lines if name in CARRIERS], head.path


@pytest.mark.parametrize("path", ["/keyed", "/open"])
@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([(b"x-api-key", OURS), (b"authorization", b"Bearer " + OTHER)], b""),
        ([(b"authorization", b"Bearer " + OURS), (b"x-api-key", OTHER)], b"key[]=" + OTHER),
        ([(b"x-api-key", OURS), (b"x-api-key", OTHER), (b"x-tg", OTHER)], b"key%5B%5D=" + OTHER),
        ([], b"key%5b%5d=" + OURS + b"&key[]=" + OTHER),
        ([], b"key[]=tg%5Flive_abcdef"),
    ],
)
def test_no_key_goes_upstream(path: str, headers: list[Pair], query: bytes) -> None:
    assert upstream(path, *headers, query=query) == ([], path.encode())


@pytest.mark.parametrize("path", ["/keyed", "/open"])
def test_the_upstreams_own_credentials_pass(path: str) -> None:
    theirs = [(b"authorization", b"Bearer eyJ0"), (b"x-api-key", b"theirs")]
    assert upstream(path, *theirs, (b"x-tg", OURS), query=b"a=1")[0] == theirs


def test_the_used_field_goes_though_it_holds_no_key_of_ours() -> None:
    assert upstream("/keyed", (b"x-api-key", b"x"), (b"x-tg", b"y"))[0] == [(b"x-tg", b"y")]


def test_a_keyless_route_passes_what_is_not_ours() -> None:
    theirs = [(b"x-api-key", b"theirs")]
    assert upstream("/open", *theirs, query=b"key[]=theirs") == (theirs, b"/open?key[]=theirs")
    assert upstream("/keyed", *theirs, query=b"key[]=theirs") == ([], b"/keyed")


def test_a_route_may_pass_keys_on() -> None:
    sent = [(b"authorization", b"Bearer " + OTHER), (b"x-api-key", OURS)]
    query = b"key[]=" + OURS
    assert upstream("/passed", *sent, query=query) == (sent, b"/passed?" + query)


def test_an_upstreams_request_id_is_not_sent_beside_ours() -> None:
    assert b"x-request-id" in RUNTIME.drop_response_headers
