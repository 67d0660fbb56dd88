"""An upstream in the compiled form that the gateway reads: addresses, and what is done with them.

`core.config.upstreams` builds these. All of them are frozen and hashable: the pool of an upstream
that did not change survives a reload. Times are integer milliseconds; what is None or 0 is off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Balance(StrEnum):
    """How a target is chosen for each request."""

    ROUND_ROBIN = "round_robin"  # in turn, by weight
    LEAST_CONNECTIONS = "least_connections"  # fewest requests in flight for its weight
    HASH = "hash"  # the same key goes to the same target


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """What is checked and shown on https. Paths of files; empty is not given.

    `digest` identifies the content of the files, so that a renewed certificate is another upstream.
    """

    verify: bool = True
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Active checks: GET `path` of every target, healthy when it answers one of `statuses`."""

    path: str
    statuses: frozenset[int]
    interval_ms: int = 5_000
    timeout_ms: int = 1_000
    healthy_after: int = 2
    unhealthy_after: int = 3


@dataclass(frozen=True, slots=True)
class Ejection:
    """Passive: so many failures in a row put a target out for `for_ms`, each time twice as long."""

    failures: int = 5
    for_ms: int = 10_000
    max_ms: int = 300_000


@dataclass(frozen=True, slots=True)
class Breaker:
    """Opens when `errors` percent of at least `minimum` tries in `window_ms` failed."""

    errors: int = 50
    window_ms: int = 10_000
    minimum: int = 20
    open_ms: int = 5_000
    probes: int = 3


@dataclass(frozen=True, slots=True)
class Retries:
    """`attempts` counts the first one. `causes` are connect, reset, timeout; `statuses` answers.

    The budget: `percent` of the requests, and `floor` a second beside that, a worker.
    """

    attempts: int = 2
    percent: int = 20
    floor: int = 3
    per_try_ms: int = 0
    backoff_ms: int = 25
    causes: frozenset[str] = frozenset(("connect", "reset", "timeout"))
    statuses: frozenset[int] = frozenset((502, 503, 504))


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where admitted requests go. Times in milliseconds, sizes in bytes.

    `urls` are `http://host:port`, `https://host:port` or `unix:///path`; `weights` go with them,
    empty is one each. `hash_by` is a header's name in lower case, `client_ip` or `path`.
    """

    name: str
    urls: tuple[str, ...]
    connect_timeout_ms: int = 1_000
    response_timeout_ms: int = 30_000
    max_connections: int = 256
    keepalive_ms: int = 60_000
    weights: tuple[int, ...] = ()
    balance: Balance = Balance.ROUND_ROBIN
    hash_by: str = ""
    tls: UpstreamTls = field(default_factory=UpstreamTls)
    health: HealthCheck | None = None
    eject: Ejection | None = None
    dns_refresh_ms: int = 0
    lifetime_ms: int = 0
    max_waiting: int = 1_024
    idle_timeout_ms: int = 0  # as the response time-out
    total_timeout_ms: int = 0
    retries: Retries | None = None
    breaker: Breaker | None = None
