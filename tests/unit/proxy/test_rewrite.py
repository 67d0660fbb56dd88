"""Header fields and paths as a route's rules change them."""

from __future__ import annotations

import pytest

from core.config import loads
from gateway.http.errors import BadRequest, PayloadTooLarge
from gateway.http.message import Request
from gateway.proxy.request import RequestHead
from gateway.proxy.target import parse_target
from gateway.runtime import RouteRuntime, Runtime

Pair = tuple[bytes, bytes]
TARGET = parse_target("http://10.0.0.1:9000")


def route(rules: str, *, path: str = "/*", more: str = "") -> RouteRuntime:
    """One route with these rules, in flow style."""
    runtime = Runtime(
        loads(
            f"""
gateway: {{trusted_proxies: [192.0.2.0/24]}}
upstreams: {{api: {{urls: ["http://10.0.0.1:9000"]}}}}
plans: {{free: {{limits: {{rate: {{rate: 5/s}}}}}}}}
routes:
  - {{match: {{path: "{path}"}}, upstream: api, name: tested, {rules}{more}}}
""",
            env={"TOKEN": "s3cret"},
        ),
        {},
    )
    found = runtime.router.match(path.replace("*", "x"), "GET", "")
    assert isinstance(found, RouteRuntime)
    return found


def sent(
    found: RouteRuntime, *headers: Pair, raw: bytes = b"/x", host: bytes = b"h"
) -> RequestHead:
    request = Request("GET", raw, [(b"host", host), *headers], peer="192.0.2.1")
    return found.rules(None).head(request, b"id-1", "pro", "sub_1")


def fields(head: RequestHead) -> list[Pair]:
    lines = head.fields.removesuffix(b"\r\n\r\n").split(b"\r\n")
    pairs = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
    return [
        pair
        for pair in pairs
        if not pair[0].startswith(b"x-forwarded") and pair[0] != b"x-request-id"
    ]


def test_fields_are_set_added_and_removed() -> None:
    found = route(
        "request_headers: {set: {X-A: 1, Authorization: 'Bearer ${TOKEN}'}, add: {X-B: new}, "
        "remove: [Cookie]}"
    )
    theirs = [
        (b"x-a", b"0"),
        (b"x-a", b"00"),
        (b"x-b", b"old"),
        (b"cookie", b"c"),
        (b"x-c", b"c"),
        (b"authorization", b"Bearer theirs"),
    ]
    got = fields(sent(found, *theirs))
    assert got == [
        (b"x-b", b"old"),
        (b"x-c", b"c"),
        (b"x-a", b"1"),
        (b"authorization", b"Bearer s3cret"),
        (b"x-b", b"new"),
    ]


def test_a_client_cannot_take_a_field_of_ours_away() -> None:
    found = route("request_headers: {set: {x-internal: 'yes'}}")
    got = fields(sent(found, (b"connection", b"x-internal, close"), (b"x-internal", b"no")))
    assert got == [(b"x-internal", b"yes")]


def test_variables_are_filled_in() -> None:
    found = route(
        "request_headers: {set: {x-who: '{client_ip} {request_id} {route} {plan} {subscription}', "
        "x-at: '{scheme}://{host}/{{x}}'}}"
    )
    got = fields(sent(found, (b"x-forwarded-for", b"198.51.100.7"), host=b"api.example:81"))
    assert got == [
        (b"x-who", b"198.51.100.7 id-1 tested pro sub_1"),
        (b"x-at", b"http://api.example:81/{x}"),
    ]


def test_a_line_break_from_a_client_ends_nothing() -> None:
    found = route("request_headers: {set: {x-host: '{host}', x-id: '{request_id}'}}")
    with pytest.raises(BadRequest):
        sent(found, host=b"h\r\nx-evil: 1")
    request = Request("GET", b"/x", [(b"host", b"h")])
    with pytest.raises(BadRequest):
        found.rules(None).head(request, b"id\r\nx-evil: 1")


@pytest.mark.parametrize(
    ("rule", "host", "sent_host"),
    [
        ("", b"client.example", b"10.0.0.1:9000"),
        ("host: preserve", b"client.example:81", b"client.example:81"),
        ("host: API.internal:8080", b"client.example", b"api.internal:8080"),
    ],
)
def test_the_host_that_is_sent(rule: str, host: bytes, sent_host: bytes) -> None:
    head = sent(route(rule), host=host).to(TARGET)
    assert head.split(b"\r\n")[1] == b"host: " + sent_host
    assert head.count(b"\nhost:") == 1
    assert b"x-forwarded-host: " + host in head


@pytest.mark.parametrize(
    ("rule", "raw", "path"),
    [
        ("add_prefix: /v2", b"/x/y", b"/v2/x/y"),
        ("strip_prefix: /a, add_prefix: /b", b"/a/x%2fy", b"/b/x%2fy"),
        ("strip_prefix: /a, add_prefix: /b", b"/a/", b"/b/"),
        ("add_prefix: /caf\u00e9", b"/x", b"/caf%C3%A9/x"),
        ("rewrite: {from: '/a/{rest...}', to: '/b/{rest}'}", b"/a/x/y%20z", b"/b/x/y%20z"),
        ("rewrite: {from: '/a/{rest...}', to: '/b/{rest}'}", b"/a/", b"/b/"),
        ("rewrite: {from: '/a/{rest...}', to: '/b/{rest}'}", b"/a", b"/a"),
        ("rewrite: {from: '/a/{rest...}', to: '/b/{rest}'}", b"/%61/x", b"/b/x"),
        ("rewrite: {from: '/a/{id}/c/{x}', to: '/{x}/c-{id}.json'}", b"/a/1/c/2", b"/2/c-1.json"),
        ("rewrite: {from: '/a/{id}/c/{x}', to: '/{x}'}", b"/a/1/d/2", b"/a/1/d/2"),
        ("rewrite: {from: '/a/{id}/c/{x}', to: '/{x}'}", b"/a//c/2", b"/a//c/2"),
        ("rewrite: {from: '/a/{id}/c/{x}', to: '/{x}'}", b"/a/1/c/2/3", b"/a/1/c/2/3"),
    ],
)
def test_paths(rule: str, raw: bytes, path: bytes) -> None:
    start = "/a/*" if "/a" in rule.partition("add_prefix")[0] else "/*"
    assert sent(route(rule, path=start), raw=raw).path == path


@pytest.mark.parametrize(
    ("rule", "raw"),
    [
        ("strip_prefix: /a", b"/a//evil.example/search"),
        ("rewrite: {from: '/a/{rest...}', to: '/{rest}'}", b"/a//evil.example/search"),
        ("rewrite: {from: '/a/{x}', to: '/b/.{x}'}", b"/a/;x"),
        ("rewrite: {from: '/a/{x}', to: '/b/.{x}'}", b"/a/%2e"),
    ],
)
def test_nothing_escapes_where_a_path_is_rewritten(rule: str, raw: bytes) -> None:
    with pytest.raises(BadRequest):
        sent(route(rule, path="/a/*"), raw=raw)


def test_rewriting_is_linear() -> None:
    found = route("rewrite: {from: '/a/{b}/{c}/{rest...}', to: '/{rest}/{c}/{b}'}", path="/a/*")
    raw = b"/a" + b"/x" * 8_000
    assert len(sent(found, raw=raw).path) == len(raw) - 2


def test_bodies_are_limited_by_what_they_announce() -> None:
    found = route("max_body: 10 B")
    assert sent(found, (b"content-length", b"10")).body_length == 10
    with pytest.raises(PayloadTooLarge):
        sent(found, (b"content-length", b"11"))
    assert sent(found, (b"transfer-encoding", b"chunked")).max_body == 10
    unlimited = route("max_body: unlimited")
    assert sent(unlimited, (b"content-length", b"9" * 18)).body_length == int("9" * 18)
    assert sent(route("max_body: 0"), raw=b"/y").body_length == 0
    by_default = route("")
    assert by_default.route.rules.max_body == 10 * 2**20


def test_answers_lose_what_a_route_sets() -> None:
    found = route("response_headers: {set: {Server: mine}, remove: [x-powered-by]}")
    assert found.drop_response_headers >= {b"server", b"x-powered-by", b"x-request-id"}
    assert found.default_server is None
    assert found.alters_answers
    plain = route("")
    assert plain.default_server == (b"server", b"tallygate")
    assert not plain.alters_answers
