"""What a client reads, over HTTP: refusals as problem details, limits as headers."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from core.secrets import generate_key
from tests.acceptance.catalogue import config, plan
from tests.support.load import Load, get
from tests.support.stack import Stack


def _problem(answer: httpx.Response, status: int, kind: str) -> dict[str, object]:
    """The body of a refusal, with what every refusal has."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    body: dict[str, object] = answer.json()
    assert body["status"] == status
    assert body["type"] == kind
    assert body["title"]
    assert body["detail"]
    assert str(body["request_id"]).startswith("req_")
    assert str(body["decision_id"]).startswith("dec_")
    return body


def _own(slug: str) -> str:
    return "urn:tallygate:problem:" + slug


def test_without_a_key(stack: Stack) -> None:
    answer = stack.get("/api/x")
    _problem(answer, 401, _own("missing-key"))
    assert answer.headers["www-authenticate"] == 'Bearer realm="api"'


@pytest.mark.parametrize("key", ["nonsense", generate_key()], ids=["nonsense", "well-formed"])
def test_with_a_key_that_does_not_exist(stack: Stack, key: str) -> None:
    answer = stack.get("/api/x", key)
    _problem(answer, 401, _own("invalid-key"))
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_with_an_expired_key(stack: Stack) -> None:
    who = stack.subscribe("thousands")
    stack.directory("update_key", who.key_id, expires_at_ms=int(time.time() * 1000) - 1000)
    _problem(stack.get("/api/x", who.key), 401, _own("expired-key"))


@pytest.mark.parametrize(
    ("status", "code", "slug"),
    [
        ("past_due", 402, "payment-required"),
        ("canceled", 403, "subscription-canceled"),
        ("paused", 403, "subscription-paused"),
    ],
)
def test_subscriptions_that_may_not(stack: Stack, status: str, code: int, slug: str) -> None:
    who = stack.subscribe("thousands", status=status)
    body = _problem(stack.get("/api/x", who.key), code, _own(slug))
    assert body["subscription_status"] == status


def test_a_plan_that_the_configuration_lacks(stack: Stack) -> None:
    who = stack.subscribe("forgotten")
    _problem(stack.get("/api/x", who.key), 403, _own("unknown-plan"))


def test_paths_and_methods_without_a_route(stack: Stack) -> None:
    who = stack.subscribe("thousands")
    _problem(stack.get("/nowhere", who.key), 404, _own("no-route"))
    answer = stack.get("/only/x", who.key)
    _problem(answer, 405, _own("method-not-allowed"))
    assert answer.headers["allow"] == "POST"
    assert stack.get("/only/x", who.key, method="POST").status_code == 200
    assert stack.state(who)["requests"].total == 1  # what was refused was not counted


def test_limits_count_down_in_the_headers_and_then_refuse(stack: Stack) -> None:
    who = stack.subscribe("small")
    for left in range(19, -1, -1):
        answer = stack.get("/api/x", who.key)
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"monthly";q=20'
        assert answer.headers["x-ratelimit-limit"] == "20"
        assert answer.headers["x-ratelimit-remaining"] == str(left)
        reset = int(answer.headers["x-ratelimit-reset"])
        assert 27 * 86_400 < reset <= 31 * 86_400
        assert answer.headers["ratelimit"] == f'"monthly";r={left};t={reset}'
        assert answer.headers["x-request-id"].startswith("req_")
        assert "retry-after" not in answer.headers

    answer = stack.get("/api/x", who.key)
    body = _problem(answer, 429, "https://iana.org/assignments/http-problem-types#quota-exceeded")
    assert body["violated-policies"] == ["monthly"]
    assert (body["limit"], body["remaining"]) == (20, 0)
    assert body["reset"] == int(answer.headers["retry-after"])
    assert 27 * 86_400 < int(answer.headers["retry-after"]) <= 31 * 86_400
    assert answer.headers["ratelimit"].startswith('"monthly";r=0;t=')
    assert answer.headers["x-ratelimit-remaining"] == "0"
    assert stack.state(who)["requests"].total == 20

    # HEAD: the same answer without its body.
    head = stack.get("/api/x", who.key, method="HEAD")
    assert (head.status_code, head.content) == (429, b"")
    assert head.headers["content-length"] != "0"
    assert head.headers["retry-after"]


def test_overage_is_marked_from_the_first_request_beyond(stack: Stack, load: Load) -> None:
    who = stack.subscribe("over")
    load.run(stack.ports, [get("/api/x", who.key)], connections=4, total=19)
    assert "x-tallygate-overage" not in stack.get("/api/x", who.key).headers
    answer = stack.get("/api/x", who.key)
    assert answer.status_code == 200
    assert answer.headers["x-tallygate-overage"] == "monthly"
    assert answer.headers["x-ratelimit-remaining"] == "0"
    assert (stack.state(who)["requests"].total, stack.state(who)["requests"].overage) == (21, 1)


def test_a_quota_that_only_warns_says_so(stack: Stack, load: Load) -> None:
    who = stack.subscribe("warned")
    load.run(stack.ports, [get("/api/x", who.key)], connections=4, total=20)
    answer = stack.get("/api/x", who.key)
    assert answer.status_code == 200
    assert answer.headers["x-tallygate-warning"] == "monthly;used=21;limit=20"


def test_a_shadow_limit_reports_and_never_refuses(stack: Stack) -> None:
    who = stack.subscribe("shadow")
    marks = [stack.get("/api/x", who.key).headers.get("x-tallygate-shadow", "") for _ in range(4)]
    assert marks == ["", "", "trial", "trial"]
    answer = stack.get("/api/x", who.key)
    assert (answer.status_code, answer.headers["ratelimit-policy"]) == (200, '"monthly";q=20')


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_the_upstream_never_sees_the_key(stack: Stack, header: str) -> None:
    who = stack.subscribe("thousands")
    value = f"Bearer {who.key}" if header == "authorization" else who.key
    answer = stack.get("/api/echo?a=1", headers={header: value, "x-other": "kept"})
    assert answer.status_code == 200
    echo = answer.json()
    assert who.key not in answer.text
    names = [name for name, _ in echo["headers"]]
    assert header not in names
    assert ["x-other", "kept"] in echo["headers"]
    assert ["x-request-id", answer.headers["x-request-id"]] in echo["headers"]
    assert (echo["path"], echo["query"]) == ("/api/echo", "a=1")


def test_a_client_s_own_request_id_is_kept(stack: Stack) -> None:
    who = stack.subscribe("thousands")
    answer = stack.get("/api/echo", who.key, headers={"x-request-id": "mine-42"})
    assert answer.headers["x-request-id"] == "mine-42"
    assert ["x-request-id", "mine-42"] in answer.json()["headers"]


def test_keyless_routes_count_each_client_address_apart(own_stack: Callable[..., Stack]) -> None:
    trusting = config(plan("any", "monthly: {period: billing, limit: 1}")).replace(
        "gateway:", "gateway:\n  trusted_proxies: [127.0.0.1]", 1
    )
    stack = own_stack(trusting, gateways=(1, 1))

    def ask(address: str, gateway: int) -> int:
        headers = {"x-forwarded-for": address}
        return stack.get("/public/x", headers=headers, gateway=gateway).status_code

    for address in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
        assert [ask(address, number % 2) for number in range(5)] == [200, 200, 200, 429, 429]
    assert stack.get("/public/x").status_code == 200  # this client's own address
    # A customer has all addresses of an IPv6 /64: they are counted as one.
    assert [ask(f"2001:db8::{n:x}", 0) for n in (1, 2, 0xFFFF)] == [429, 429, 429]
    assert ask("2001:db8:0:1::1", 0) == 200
    # Nothing of it is in the ledger: there is nobody to bill.
    stack.quiet()
    assert stack.redis.zcard("tg1:{0}:dirty") == 0


def test_the_http_server_does_not_name_itself(stack: Stack) -> None:
    who = stack.subscribe("thousands")
    for answer in (stack.get("/api/x", who.key), stack.get("/api/x"), stack.get("/-/healthz")):
        assert answer.headers.get_list("server") == ["tallygate"]
    # An upstream's own name is passed on.
    assert stack.get("/api/named", who.key).headers.get_list("server") == ["upstream"]


def test_a_claimed_address_is_not_believed_of_a_stranger(stack: Stack) -> None:
    statuses = [
        stack.get(
            "/public/x", headers={"x-forwarded-for": f"192.0.2.{n}"}, gateway=n % 4
        ).status_code
        for n in range(5)
    ]
    assert statuses == [200, 200, 200, 429, 429]
