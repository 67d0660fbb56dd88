"""What a route does besides counting: headers, paths, browsers, answers of its own, sizes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.acceptance.conftest import NewDatabase
from tests.support import wait_until
from tests.support.page import Blocked, Page
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber, start_stack

APP = "https://app.example.com"

CONFIG = """
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
log: {format: json, level: warning}
gateway: {client: {max_body: 100 KiB}}
meters: {credits: {unit: credit}}
upstreams: {api: {urls: ["${UPSTREAM}"]}}
routes:
  - {match: {path: /robots.txt}, respond: {body: "User-agent: *\\nDisallow: /\\n"}}
  - match: {path: /down/*}
    respond: {status: 503, headers: {retry-after: 120}, json: {error: maintenance, until: 1.50}}
    cors: {origins: ["*"]}
  - {match: {path: /moved/*}, respond: {status: 308, headers: {location: "https://{host}{uri}"}}}
  - {match: {path: /api/search}, upstream: api, meters: {requests: 1, credits: 5}}
  - {match: {path: /api/*}, upstream: api}
  - match: {path: /old/*}
    upstream: api
    host: api.internal
    rewrite: {from: "/old/{id}/{rest...}", to: "/new/{rest}/{id}/echo"}
    request_headers:
      set: {authorization: Basic upstream, x-plan: "{plan}/{subscription}"}
      remove: [cookie]
    response_headers: {set: {cache-control: private}, remove: [x-powered-by, server]}
  - match: {path: /shop/*, methods: [GET, PUT]}
    upstream: api
    cors: {origins: [https://app.example.com], expose: [x-own], credentials: true}
    response_headers: {add: {x-route: "{route}"}}
  - {match: {path: /small/*}, upstream: api, max_body: 10}
  - {match: {path: /answered/*}, upstream: api, max_body: 10, charge: on_response}
  - {match: {path: /large/*}, upstream: api, max_body: unlimited}
  - {match: {path: /git/*}, upstream: api, encoded_slash: allow}
plans:
  plenty: {limits: {a_day: {period: billing, limit: 1000000}}}
  two: {limits: {a_day: {period: billing, limit: 2}}}
"""


@pytest.fixture(scope="module")
def stack(new_database: NewDatabase) -> Iterator[Stack]:
    with (
        server_directory() as path,
        start_stack(path, CONFIG, new_database(), reconcilers=0) as running,
    ):
        yield running


def _used(stack: Stack, subscriber: Subscriber) -> int:
    total = stack.state(subscriber).get("requests")
    return int(total.total) if total else 0


def _counted(stack: Stack, outcome: str, route: str, least: int) -> None:
    """Metrics are written a moment later; other tests may have added to them."""
    wait_until(
        lambda: stack.metric("tallygate_requests_total", outcome=outcome, route=route) >= least,
        what=f"{least} {outcome}",
    )


# Answers of the gateway's own


def test_static_answers_need_no_key_and_no_upstream(stack: Stack) -> None:
    answer = stack.get("/robots.txt")
    assert (answer.status_code, answer.text) == (200, "User-agent: *\nDisallow: /\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-request-id"]

    answer = stack.get("/down/anything", method="POST", content=b"x" * 1000)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "120"
    assert answer.headers["content-type"] == "application/json"
    assert answer.text == '{"error":"maintenance","until":1.50}'

    answer = stack.get("/moved/a%20b?x=1&y", headers={"host": "api.example.com"})
    assert answer.status_code == 308
    assert answer.headers["location"] == "https://api.example.com/moved/a%20b?x=1&y"

    answer = stack.get("/robots.txt", method="HEAD")
    assert (answer.headers["content-length"], answer.content) == ("26", b"")
    _counted(stack, "static", "robots_txt", 2)


# Headers and paths


def test_a_request_is_rewritten_on_its_way(stack: Stack) -> None:
    who = stack.subscribe("plenty")
    answer = stack.get("/old/7/a%20b/c?q=1", who.key, headers={"cookie": "a=b", "x-plan": "forged"})
    seen = answer.json()
    assert (seen["path"], seen["query"]) == ("/new/a%20b/c/7/echo", "q=1")
    fields = dict(seen["headers"])
    assert fields["host"] == "api.internal"
    assert fields["x-plan"] == f"plenty/{who.id}"
    assert fields["authorization"] == "Basic upstream"
    assert [name for name, _ in seen["headers"]].count("x-plan") == 1
    assert "cookie" not in fields
    assert answer.headers["cache-control"] == "private"
    assert "server" not in answer.headers
    assert answer.headers["x-ratelimit-limit"] == "1000000"


def test_a_path_is_charged_as_what_it_is_served_as(stack: Stack) -> None:
    who = stack.subscribe("plenty")
    for path in (
        "/api/Search", "/api/search/", "/api//search", "/api/search.", "/api/search;x",
        "/api/x/%2e%2e/search", "/api/x%2F..%2Fsearch", "/api/sea%2572ch", "/api/%c0%af",
    ):  # fmt: skip
        answer = _raw(stack, f"GET {path} HTTP/1.1\r\nhost: h\r\nx-api-key: {who.key}\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 "), path
    assert _used(stack, who) == 0
    assert stack.get("/api/sea%72ch", who.key).status_code == 200
    assert stack.state(who)["credits"].total == 5
    answer = stack.get("/git/group%2Frepo/echo", who.key)
    assert answer.json()["path"] == "/git/group%2Frepo/echo"


def _raw(stack: Stack, *pieces: str | bytes) -> bytes:
    """What comes back until the connection is closed, or an answer's end is there."""
    with socket.create_connection(("127.0.0.1", stack.ports[0]), timeout=20) as sock:
        for piece in pieces:
            sock.sendall(piece.encode() if isinstance(piece, str) else piece)
        return sock.recv(65536)


# Browsers


def test_a_page_calls_the_api(stack: Stack) -> None:
    """A limit that is reached, a key that is missing: a page reads these as it reads an answer."""
    who = stack.subscribe("two")
    page = Page(APP, stack.get)
    key = {"Authorization": f"Bearer {who.key}", "Content-Type": "application/json"}
    for _ in range(2):
        status, fields, body = page.fetch("/shop/opened", headers=key, credentials=True)
        assert (status, body) == (200, b"ok\n")
        assert fields["x-own"] == "1"
        assert fields["ratelimit"]
        assert fields["x-ratelimit-limit"] == "2"
    status, fields, body = page.fetch("/shop/x", "PUT", key, credentials=True)
    assert status == 429
    assert int(fields["retry-after"]) > 0
    assert b"quota-exceeded" in body
    status, _, body = page.fetch("/shop/x", headers={"X-Api-Key": "nonsense"}, credentials=True)
    assert (status, b"invalid-key" in body) == (401, True)
    status, _, body = page.fetch("/shop/x")
    assert (status, b"missing-key" in body) == (401, True)
    assert page.preflights == 4
    assert _used(stack, who) == 2, "preflights are free"
    _counted(stack, "preflight", "shop", 4)


@pytest.mark.parametrize(
    ("origin", "path", "method", "headers"),
    [
        ("https://evil.example", "/shop/x", "GET", {}),
        ("https://evil.example", "/shop/x", "GET", {"x-api-key": "k"}),
        (APP, "/shop/x", "DELETE", {}),
        (APP, "/shop/x", "GET", {"x-unheard-of": "1"}),
        (APP, "/api/x", "GET", {}),  # a route without cors
    ],
)
def test_what_a_page_may_not(
    stack: Stack, origin: str, path: str, method: str, headers: dict[str, str]
) -> None:
    page = Page(origin, stack.get)
    with pytest.raises(Blocked):
        page.fetch(path, method, headers)


def test_the_upstream_s_own_fields_are_replaced(stack: Stack) -> None:
    who = stack.subscribe("plenty")
    answer = stack.get("/shop/opened", who.key, headers={"origin": APP})
    assert answer.headers.get_list("access-control-allow-origin") == [APP]
    assert "x-own" in answer.headers["access-control-expose-headers"]
    assert answer.headers.get_list("vary", split_commas=True) == ["accept", "origin"]
    assert answer.headers["x-route"] == "shop"
    other = stack.get("/shop/opened", who.key, headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "origin" in other.headers.get_list("vary", split_commas=True)


def test_anybody_may_read_what_is_for_everybody(stack: Stack) -> None:
    status, _, body = Page("https://any.example", stack.get).fetch("/down/x")
    assert (status, b"maintenance" in body) == (503, True)


# Bodies


def test_a_body_that_is_announced_too_large_costs_nothing(stack: Stack) -> None:
    who = stack.subscribe("plenty")
    answer = stack.get("/small/x", who.key, method="POST", content=b"x" * 11)
    assert answer.status_code == 413
    assert answer.json()["type"] == "urn:tallygate:problem:content-too-large"
    assert answer.json()["max_bytes"] == 10
    head = f"POST /small/x HTTP/1.1\r\nhost: h\r\nx-api-key: {who.key}\r\ncontent-length: 11\r\n"
    answer_head = _raw(stack, head + "expect: 100-continue\r\n\r\n")
    assert answer_head.startswith(b"HTTP/1.1 413 "), "and the client need not send it"
    assert stack.get("/api/x", who.key, method="POST", content=b"x" * 102_401).status_code == 413
    assert _used(stack, who) == 0
    assert stack.served("", "/small/x") == 0
    assert stack.get("/small/x", who.key, method="POST", content=b"x" * 10).status_code == 200
    assert stack.get("/api/x", who.key, method="POST", content=b"x" * 102_400).status_code == 200
    assert stack.get("/large/x", who.key, method="POST", content=b"x" * 500_000).status_code == 200
    assert _used(stack, who) == 3


@pytest.mark.parametrize(("path", "charged"), [("/small/y", 1), ("/answered/y", 0)])
def test_a_body_in_chunks_is_cut_at_the_limit(stack: Stack, path: str, charged: int) -> None:
    who = stack.subscribe("plenty")
    head = f"POST {path} HTTP/1.1\r\nhost: h\r\nx-api-key: {who.key}\r\n"
    head += "transfer-encoding: chunked\r\n\r\n"
    assert _raw(stack, head + "8\r\n12345678\r\n3\r\n123\r\n").startswith(b"HTTP/1.1 413 ")
    assert stack.served("", path) == 0
    wait_until(lambda: _used(stack, who) == charged, what="the charge of the route")


def test_a_long_body_in_chunks_is_charged_for_what_went_upstream(stack: Stack) -> None:
    who = stack.subscribe("plenty")
    head = f"POST /api/cut HTTP/1.1\r\nhost: h\r\nx-api-key: {who.key}\r\n"
    head += "transfer-encoding: chunked\r\n\r\n"
    chunk = b"c800\r\n" + b"x" * 51_200 + b"\r\n"
    assert _raw(stack, head, chunk, chunk, chunk).startswith(b"HTTP/1.1 413 ")
    assert stack.served("", "/api/cut") == 0
    assert _used(stack, who) == 1
