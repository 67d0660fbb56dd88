"""RFC 9457 answers for everything the gateway refuses or cannot do.

Each function returns a `Problem`: status, headers (lower-case names) and
the JSON body. Every body carries `type`, `title`, `status`, `detail` and `request_id`. None may be
cached. Length and HEAD are the exchange's affair.

Types that a standard names are absolute (`https://iana.org/assignments/http-problem-types#...`),
ours are URNs, which promise no web page: `urn:tallygate:problem:<slug>`. A payment problem is 402
or 403 with its own type and never 429: waiting does not help.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from core.policy import Status
from gateway.answers.headers import Headers, headline, retry_after_s
from gateway.answers.verdict import LimitState

IANA_BASE = "https://iana.org/assignments/http-problem-types#"
OWN_BASE = "urn:tallygate:problem:"

_COMMON: Headers = [
    (b"content-type", b"application/problem+json"),
    (b"cache-control", b"no-store"),
]


class Problem(NamedTuple):
    """An answer ready to send."""

    status: int
    headers: Headers
    body: bytes


def quota_exceeded(
    states: Sequence[LimitState],
    *,
    request_id: str,
    decision_id: str,
    limit_headers: Iterable[tuple[bytes, bytes]] = (),
) -> Problem:
    """429: at least one limit refused.

    Args:
        states: all limits of the decision, at least one of them with `allowed` False.
        limit_headers: `PlanHeaders.of(states)`. Retry-After is added when it is not among them.
    """
    state = headline(states)
    reset_s = retry_after_s([state])
    headers = [*limit_headers]
    if not any(name == b"retry-after" for name, _ in headers):
        headers.append((b"retry-after", b"%d" % retry_after_s(states)))
    return _problem(
        429,
        IANA_BASE + "quota-exceeded",
        "Request cannot be satisfied as assigned quota has been exceeded",
        _quota_detail(state, reset_s),
        request_id,
        headers,
        {
            "violated-policies": [s.name for s in states if not s.allowed],
            "decision_id": decision_id,
            "limit": state.limit,
            "remaining": max(0, state.remaining),
            "reset": reset_s,
        },
    )


def upgrade_required(detail: str, *, request_id: str) -> Problem:
    """426: a WebSocket of a version that is not spoken here."""
    fields = [
        (b"sec-websocket-version", b"13"),
        (b"upgrade", b"websocket"),
        (b"connection", b"upgrade"),
    ]
    kind = OWN_BASE + "upgrade-required"
    return _problem(426, kind, "Upgrade required", detail, request_id, fields)


def temporary_reduced_capacity(
    retry_after: int, *, request_id: str, policies: Sequence[str] = ()
) -> Problem:
    """503: the gateway cannot decide now (its store does not answer). `retry_after` in seconds."""
    seconds = max(1, retry_after)
    return _problem(
        503,
        IANA_BASE + "temporary-reduced-capacity",
        "Request cannot be satisfied due to temporary server capacity constraints",
        "Quota cannot be checked at the moment, so the request was not served. "
        f"Try again in {_duration(seconds)}.",
        request_id,
        [(b"retry-after", b"%d" % seconds)],
        {"violated-policies": list(policies)},
    )


def upstream_busy(retry_after: int, *, request_id: str, code: str = "upstream-busy") -> Problem:
    """503: all connections to the upstream stayed taken. `retry_after` in seconds."""
    seconds = max(1, retry_after)
    return _problem(
        503,
        OWN_BASE + "upstream-busy",
        "Upstream busy",
        f"The API behind this gateway is busy. Try again in {_duration(seconds)}.",
        request_id,
        [(b"retry-after", b"%d" % seconds)],
        {"code": code},
    )


def upstream_unavailable(retry_after: int, *, request_id: str, code: str) -> Problem:
    """503: the upstream failed too often and is given a rest. `retry_after` in seconds."""
    seconds = max(1, retry_after)
    return _problem(
        503,
        OWN_BASE + "upstream-unavailable",
        "Upstream unavailable",
        "The API behind this gateway has been failing and is given a rest. "
        f"Try again in {_duration(seconds)}.",
        request_id,
        [(b"retry-after", b"%d" % seconds)],
        {"code": code},
    )


def missing_key(*, request_id: str) -> Problem:
    """401: the request carries no API key."""
    return _problem(
        401,
        OWN_BASE + "missing-key",
        "API key missing",
        "The request carries no API key. Send it as `Authorization: Bearer <key>`.",
        request_id,
        # RFC 6750 section 3.1: no error code when there was no credential at all.
        [(b"www-authenticate", b'Bearer realm="api"')],
    )


def invalid_key(*, request_id: str) -> Problem:
    """401: no such key. Also for a revoked one: whether a key existed is nobody's business."""
    return _problem(
        401,
        OWN_BASE + "invalid-key",
        "API key not valid",
        "The API key is not valid. Check that it was copied whole and was not revoked.",
        request_id,
        [(b"www-authenticate", b'Bearer realm="api", error="invalid_token"')],
    )


def expired_key(*, request_id: str) -> Problem:
    """401: the key's expiry has passed."""
    return _problem(
        401,
        OWN_BASE + "expired-key",
        "API key expired",
        "The API key has expired. Create a new one or ask the API's provider for it.",
        request_id,
        [
            (
                b"www-authenticate",
                b'Bearer realm="api", error="invalid_token", error_description="expired"',
            )
        ],
    )


def inactive_key(*, request_id: str) -> Problem:
    """403: the key is known and switched off."""
    return _problem(
        403,
        OWN_BASE + "inactive-key",
        "API key inactive",
        "The API key is switched off. Its owner can switch it on again.",
        request_id,
    )


_STATUS_WORDS = {
    Status.PAST_DUE: ("payment-required", "Payment required", "has an unpaid invoice"),
    Status.CANCELED: ("subscription-canceled", "Subscription canceled", "was canceled"),
    Status.PAUSED: ("subscription-paused", "Subscription paused", "is paused"),
}


def subscription(status: Status, code: int, *, request_id: str) -> Problem:
    """402 or 403 (`code`, from the plan's status rule): the subscription's status refuses."""
    slug, title, words = _STATUS_WORDS.get(
        status, ("subscription-inactive", "Subscription not active", f"is {status.value}")
    )
    remedy = "Pay it" if status is Status.PAST_DUE else "Renew it"
    return _problem(
        code,
        OWN_BASE + slug,
        title,
        f"The subscription of this API key {words}. {remedy} to use the API again; "
        "waiting does not help.",
        request_id,
        extra={"subscription_status": status.value},
    )


def forbidden(slug: str, detail: str, *, request_id: str) -> Problem:
    """403 for any other reason; `slug` names it, `detail` is a sentence for the client."""
    return _problem(403, OWN_BASE + slug, "Forbidden", detail, request_id)


def not_found(*, request_id: str) -> Problem:
    """404: no route matches."""
    return _problem(
        404,
        OWN_BASE + "no-route",
        "Not found",
        "No route of this gateway matches the request's host and path.",
        request_id,
    )


def method_not_allowed(allowed: Iterable[str], *, request_id: str) -> Problem:
    """405: a route matches the path but not the method."""
    methods = ", ".join(sorted(set(allowed)))
    return _problem(
        405,
        OWN_BASE + "method-not-allowed",
        "Method not allowed",
        f"This path answers to {methods} only." if methods else "This path answers to no method.",
        request_id,
        [(b"allow", methods.encode("ascii"))],
    )


def content_too_large(limit_bytes: int, *, request_id: str) -> Problem:
    """413: the body is, or announces to be, longer than allowed."""
    return _problem(
        413,
        OWN_BASE + "content-too-large",
        "Content too large",
        f"The request's body is longer than the {limit_bytes} bytes that are accepted here.",
        request_id,
        extra={"max_bytes": limit_bytes},
    )


def header_fields_too_large(*, request_id: str) -> Problem:
    """431: the header section is too long."""
    return _problem(
        431,
        OWN_BASE + "header-fields-too-large",
        "Request header fields too large",
        "The request's header fields are longer than is accepted here. Send fewer or shorter ones.",
        request_id,
    )


def bad_request(detail: str, *, request_id: str) -> Problem:
    """400: not a request this gateway can forward safely; `detail` is a sentence saying why."""
    return _problem(400, OWN_BASE + "bad-request", "Bad request", detail, request_id)


def request_timeout(*, request_id: str) -> Problem:
    """408: the client stopped sending the body it had announced."""
    return _problem(
        408,
        OWN_BASE + "request-timeout",
        "Request time-out",
        "The request's body stopped arriving, so the request was given up. Send it again as a "
        "whole.",
        request_id,
        # RFC 9110 section 15.5.9: what comes next on this connection would be the rest of the body.
        [(b"connection", b"close")],
    )


def bad_gateway(*, request_id: str, code: str = "bad-gateway") -> Problem:
    """502: the upstream could not be reached or broke off."""
    return _problem(
        502,
        OWN_BASE + "bad-gateway",
        "Bad gateway",
        "The API behind this gateway could not be reached, or ended its answer early.",
        request_id,
        extra={"code": code},
    )


def gateway_timeout(timeout_ms: int, *, request_id: str, code: str = "upstream-timeout") -> Problem:
    """504: the upstream did not answer in time."""
    return _problem(
        504,
        OWN_BASE + "gateway-timeout",
        "Gateway time-out",
        f"The API behind this gateway did not answer within {timeout_ms / 1000:g} seconds.",
        request_id,
        extra={"code": code},
    )


def internal_error(*, request_id: str) -> Problem:
    """500: a fault of the gateway itself. What it was stands in the log under the request id."""
    return _problem(
        500,
        OWN_BASE + "internal-error",
        "Internal error",
        "The gateway failed to handle the request. Quote the request_id when reporting it.",
        request_id,
    )


def unreadable(status: int, code: str, detail: str) -> Problem:
    """4xx, 501, 505: what was sent is no request, so it has no id either."""
    members = {"type": OWN_BASE + code, "title": "Bad request", "status": status, "detail": detail}
    return Problem(status, list(_COMMON), orjson.dumps(members))


def with_decision(problem: Problem, decision_id: str) -> Problem:
    """The same answer with the id that support looks up in the log."""
    body = orjson.dumps({**orjson.loads(problem.body), "decision_id": decision_id})
    return Problem(problem.status, problem.headers, body)


def _problem(
    status: int,
    kind: str,
    title: str,
    detail: str,
    request_id: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
    extra: dict[str, Any] | None = None,
) -> Problem:
    members: dict[str, Any] = {
        "type": kind,
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    if extra:
        members.update(extra)
    body = orjson.dumps(members)
    return Problem(status, [*_COMMON, *headers], body)


def _quota_detail(state: LimitState, reset_s: int) -> str:
    """Which limit, how much is left, when it resets: in one plain sentence or two."""
    left = max(0, state.remaining)
    if state.kind == "concurrency":
        return (
            f'Limit "{state.name}" allows {state.limit} requests at the same time and all of its '
            "slots are taken. One is free as soon as an earlier request ends."
        )
    unit = state.unit.removesuffix("s") if state.unit.islower() else state.unit
    if state.limit != 1 and unit.isalpha() and unit.islower():
        unit += "s"  # meters name their unit in the singular; abbreviations (GB) have no plural
    span = {
        "rate": "at once",
        "window": f"in {_duration(state.window_s)}",
        "quota": "a day"
        if state.window_s == 86_400
        else "a week"
        if state.window_s
        else "a period",
    }[state.kind]
    few = ", fewer than this request costs" if left else ""
    verb = "is" if left == 1 else "are"
    when = "More is free" if state.kind == "rate" else "It resets"
    return (
        f'Limit "{state.name}" allows {state.limit} {unit} {span}; {left} {verb} left{few}. '
        f"{when} in {_duration(reset_s)}."
    )


def _duration(seconds: int) -> str:
    """Seconds for people, two units at most and never less than the truth: `3 hours 20 minutes`."""
    units = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
    seconds = max(seconds, 1)
    index = next(i for i, (_name, size) in enumerate(units) if seconds >= size)
    name, size = units[index]
    count, rest = divmod(seconds, size)
    text = f"{count} {name}{'s' if count != 1 else ''}"
    if rest and index + 1 < len(units):
        small_name, small = units[index + 1]
        small_count = -(-rest // small)
        if small_count * small == size:  # 59.5 minutes are an hour
            return _duration((count + 1) * size)
        text += f" {small_count} {small_name}{'s' if small_count != 1 else ''}"
    return text
