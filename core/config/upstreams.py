"""Models of upstreams: addresses, balancing, TLS, health, pools, time-outs, retries, breaker.

These hold what the file says; `upstream_compile` builds the `core.upstream` form. What may surprise
is off until its section is there: health, eject, dns, retries, breaker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from core.config.base import Section
from core.config.catalog import FORM_TAG, Threshold
from core.config.fields import (
    Count,
    CountOrZero,
    DurationMs,
    Flag,
    Host,
    StatusClass,
    UpstreamUrl,
    duration,
    empty_as_none,
    integer,
    preset,
)

Weight = Annotated[
    int,
    BeforeValidator(integer(1, 1_000)),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 1_000}),
]

FilePath = Annotated[str | None, BeforeValidator(empty_as_none)]

RETRY_CAUSES = ("connect", "reset", "timeout")
RetryCause = Literal["connect", "reset", "timeout"]


def _check_path(path: str) -> str:
    if not path.startswith("/") or not (path.isascii() and path.isprintable()) or " " in path:
        raise ValueError("not a path; write one that begins with /, such as /healthz")
    return path


def _check_hash(key: str) -> str:
    text = key.strip().lower()
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+.^_`|~-")
    if not text or not allowed.issuperset(text):
        raise ValueError("nothing to hash; write client_ip, path, or the name of a header")
    return text


class WeightedUrl(Section):
    """One address of an upstream, with its share."""

    url: UpstreamUrl = Field(description="http://host:port, https://host:port or unix:///path.")
    weight: Weight = preset(1, 1, None, "Its share beside the others' weights, 1 to 1000.")


def _url_form(value: Any) -> str:
    return FORM_TAG + ("url" if isinstance(value, Mapping | WeightedUrl) else "text")


UrlSpec = Annotated[
    Annotated[UpstreamUrl, Tag(FORM_TAG + "text")] | Annotated[WeightedUrl, Tag(FORM_TAG + "url")],
    Discriminator(_url_form),
]


class HashBalance(Section):
    """The same key goes to the same target, as long as that is up."""

    hash: Annotated[str, AfterValidator(_check_hash)] = Field(
        description="What is hashed: client_ip, path, or the name of a request header."
    )


def _balance_form(value: Any) -> str:
    return FORM_TAG + ("hash" if isinstance(value, Mapping | HashBalance) else "word")


BalanceSpec = Annotated[
    Annotated[Literal["round_robin", "least_connections"], Tag(FORM_TAG + "word")]
    | Annotated[HashBalance, Tag(FORM_TAG + "hash")],
    Discriminator(_balance_form),
]


class TlsSpec(Section):
    """What is checked and shown on https."""

    verify: Flag = preset(True, True, None, "false takes any certificate: for tests only.")
    ca: FilePath = Field(
        default=None, description="PEM file of authorities; the system's by default."
    )
    cert: FilePath = Field(default=None, description="PEM file of our own certificate chain.")
    key: FilePath = Field(default=None, description="PEM file of its private key.")
    server_name: Host | None = Field(
        default=None, description="Name asked for (SNI) and checked; the URL's host by default."
    )


class HealthSpec(Section):
    """Active checks of every target."""

    path: Annotated[str, AfterValidator(_check_path)] = Field(description="What is asked: GET.")
    interval_ms: DurationMs = duration("5s", "interval", "Between two checks.")
    timeout_ms: DurationMs = duration("1s", "timeout", "For a check, connecting included.")
    healthy_after: Count = preset(2, 2, None, "Good checks in a row that take a target back.")
    unhealthy_after: Count = preset(3, 3, None, "Bad checks in a row that take a target out.")
    status: tuple[StatusClass, ...] = Field(
        default=("2xx",), min_length=1, description="Good answers: codes or classes."
    )


class EjectSpec(Section):
    """A target that fails requests is left out for a while."""

    failures: Count = preset(5, 5, None, "Failures in a row that put a target out.")
    for_ms: DurationMs = duration("10s", "for", "How long; twice as long each time again.")
    max_ms: DurationMs = duration("5m", "max", "How long at most.")


class DnsSpec(Section):
    """Names are resolved in the background, and every address becomes a target."""

    refresh_ms: DurationMs = duration("30s", "refresh", "Between two look-ups.")


class UpstreamTimeouts(Section):
    """How long an upstream may take."""

    connect_ms: DurationMs = duration(
        "1s", "connect", "To accept a connection, TLS included; also the wait for a free one."
    )
    response_ms: DurationMs = duration("30s", "response", "To begin an answer.")
    idle_ms: DurationMs | None = preset(
        None, None, "idle", "Between two pieces of an answer; as response by default."
    )
    total_ms: DurationMs | None = preset(
        None, None, "total", "For the whole request, its retries included; no bound by default."
    )


class UpstreamPool(Section):
    """Connections to an upstream, a gateway worker."""

    max_connections: Count = preset(256, 256, None, "Connections at most.")
    keepalive_ms: DurationMs = duration("60s", "keepalive", "How long an idle one is kept.")
    lifetime_ms: DurationMs | None = preset(
        None, None, "lifetime", "How old one may become; any age by default."
    )
    max_waiting: CountOrZero = preset(
        1_024, 1_024, None, "Requests that may wait for one; more are refused at once (503)."
    )


class RetryBudget(Section):
    """How many requests may be tried again, so that retries do not drown who is struggling."""

    percent: Threshold = preset(20, "20%", None, "Of the requests, a worker.")
    floor: CountOrZero = preset(3, 3, None, "So many a second beside that.")


def _one_of_causes(value: Any) -> Any:
    if value in RETRY_CAUSES:
        return value
    text = str(value).strip().lower()
    if len(text) == 3 and text.isascii() and text.isdigit() and 500 <= int(text) <= 599:
        return int(text)
    raise ValueError("not a cause; write connect, reset, timeout, or a status from 500 to 599")


Cause = Annotated[
    RetryCause | int,
    BeforeValidator(_one_of_causes),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(RETRY_CAUSES), "type": "string"},
                {"type": "integer", "minimum": 500, "maximum": 599},
            ]
        }
    ),
]


class RetrySpec(Section):
    """Trying again: idempotent methods, or what the upstream saw no byte of."""

    attempts: Annotated[
        int,
        BeforeValidator(integer(2, 10)),
        WithJsonSchema({"type": "integer", "minimum": 2, "maximum": 10}),
    ] = preset(2, 2, None, "Tries in all, the first one included, 2 to 10.")
    budget: RetryBudget = Field(
        default_factory=RetryBudget, description="How many requests may be tried again."
    )
    per_try_ms: DurationMs | None = preset(
        None, None, "per_try", "For a try to begin its answer; as timeout.response by default."
    )
    backoff_ms: DurationMs = duration(
        "25ms", "backoff", "Before the second try up to this, at random; doubled each time."
    )
    on: tuple[Cause, ...] = Field(
        default=("connect", "reset", "timeout", 502, 503, 504),
        min_length=1,
        description="What is tried again: connect, reset, timeout (of per_try), statuses.",
        json_schema_extra={"default": ["connect", "reset", "timeout", 502, 503, 504]},
    )


class BreakerSpec(Section):
    """An upstream that fails is given a rest: 503 at once, then a few probes."""

    errors: Threshold = preset(50, "50%", None, "Share of failures that opens it.")
    window_ms: DurationMs = duration("10s", "window", "Over which failures are counted.")
    minimum: Count = preset(20, 20, None, "Tries in a window below which it stays closed.")
    open_ms: DurationMs = duration("5s", "open", "How long it stays open before it probes.")
    probes: Count = preset(3, 3, None, "Requests let through, all of which must succeed.")


class UpstreamSpec(Section):
    """Where admitted requests go."""

    urls: tuple[UrlSpec, ...] = Field(
        min_length=1,
        description="http://host:port, https://host:port or unix:///path, one or more, each "
        "alone or as {url, weight}.",
    )
    balance: BalanceSpec = Field(
        default="round_robin",
        description="How requests are spread: round_robin, least_connections, {hash: client_ip}.",
    )
    tls: TlsSpec | None = Field(default=None, description="What is checked and shown on https.")
    health: HealthSpec | None = Field(default=None, description="Active checks; off by default.")
    eject: EjectSpec | None = Field(
        default=None, description="Leave out targets that fail; off by default."
    )
    dns: DnsSpec | None = Field(
        default=None,
        description="Resolve names in the background; by default each new connection does.",
    )
    pool: UpstreamPool = Field(default_factory=UpstreamPool, description="Connections to it.")
    timeout: UpstreamTimeouts = Field(
        default_factory=UpstreamTimeouts, description="How long it may take."
    )
    retries: RetrySpec | None = Field(default=None, description="Try again; off by default.")
    breaker: BreakerSpec | None = Field(
        default=None, description="Rest an upstream that fails; off by default."
    )
