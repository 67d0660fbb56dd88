"""The typed root of `config.yaml` and the sections that set up the processes.

Attribute names carry the unit (`timeout_ms`), the file's keys do not (`timeout: 50ms`). The
descriptions below become the JSON Schema that editors complete from. What is sold and counted
(meters, plans, routes, upstreams) is in `catalog`, and compiled to `core.policy` by `compile`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from core.config.base import Section
from core.config.catalog import MeterSpec, PlanSpec, RouteSpec
from core.config.client import ClientSettings
from core.config.fields import (
    Address,
    BatchSize,
    Cidr,
    Count,
    DurationMs,
    DurationOrZeroMs,
    Flag,
    HeaderName,
    Listen,
    Name,
    Size,
    Workers,
    duration,
    empty_as_none,
    preset,
    store_url,
)
from core.config.tls import Http2Settings, TlsSettings
from core.config.upstreams import UpstreamSpec

MIN_HOURS_MS = 62 * 86_400_000
MIN_IDLE_MS = 3_600_000

# What each accepted scheme becomes: one name a meaning, for every driver behind.
REDIS_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
}
POSTGRES_SCHEMES = {"postgresql": "postgresql", "postgres": "postgres"}


class KeySettings(Section):
    """Where a request carries its API key."""

    headers: tuple[HeaderName, ...] = Field(
        default=("authorization", "x-api-key"),
        description="Headers a key may be read from, in this order; authorization means Bearer.",
    )
    query: str | None = Field(
        default=None,
        description="Query parameter a key may be read from; none by default, as URLs get logged.",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not self.headers and not self.query:
            raise ValueError("no place to read a key from: name a header or a query parameter")
        return self


class KeyCacheSettings(Section):
    """The cache of key look-ups in each gateway worker."""

    size: Count = preset(100_000, 100_000, None, "Keys held at most.")
    ttl_ms: DurationMs = duration("5m", "ttl", "How long a valid key is trusted unasked.")
    negative_ttl_ms: DurationOrZeroMs = duration(
        "30s", "negative_ttl", "How long an unknown key is refused unasked; 0s asks every time."
    )


class HeaderSettings(Section):
    """Which limit headers an answer carries."""

    ratelimit: Flag = preset(True, True, None, "RateLimit and RateLimit-Policy.")
    legacy: Flag = preset(True, True, None, "X-RateLimit-Limit, -Remaining and -Reset.")


class AdmissionSettings(Section):
    """How checks travel to Redis."""

    max_batch: BatchSize = preset(128, 128, None, "Checks in one script call, 1000 at most.")
    max_in_flight: Count = preset(1, 1, None, "Script calls on their way at once, a worker.")


class OutageSettings(Section):
    """What a worker does while Redis does not answer; each route says which: `outage`."""

    spool_dir: Annotated[str | None, BeforeValidator(empty_as_none)] = Field(
        default=None,
        description="Directory for what was admitted during an outage, until it is counted; on a "
        "disk that survives a restart. Unset: no route may be open or local.",
    )
    spool_max: Size = preset(
        64 * 2**20, "64 MiB", None, "Size of a worker's spool, upon which it refuses (503)."
    )
    instances: Count = preset(
        1, 1, None, "Gateway hosts; a worker's share of a limit is one part in hosts times workers."
    )


class GatewaySettings(Section):
    """The data plane: the proxy in front of the APIs."""

    listen: Listen = preset(
        Address("127.0.0.1", 8080), "127.0.0.1:8080", None, "Address to listen on, host:port."
    )
    workers: Workers = preset(
        None, "auto", None, "Worker processes; auto is one a core this process may use."
    )
    key: KeySettings = Field(
        default_factory=KeySettings, description="Where a request carries its API key."
    )
    key_cache: KeyCacheSettings = Field(
        default_factory=KeyCacheSettings, description="The cache of key look-ups."
    )
    trusted_proxies: tuple[Cidr, ...] = Field(
        default=(),
        description="Networks (CIDR) whose X-Forwarded-For is believed; nobody by default.",
    )
    client: ClientSettings = Field(
        default_factory=ClientSettings, description="Sizes and times of clients' requests."
    )
    tls: TlsSettings | None = Field(
        default=None, description="HTTPS, on an address of its own beside `listen`."
    )
    http2: Http2Settings = Field(
        default_factory=Http2Settings, description="HTTP/2 towards clients."
    )
    headers: HeaderSettings = Field(
        default_factory=HeaderSettings, description="Which limit headers an answer carries."
    )
    admission: AdmissionSettings = Field(
        default_factory=AdmissionSettings, description="How checks travel to Redis."
    )
    access_log: Flag = preset(False, False, None, "One log line a request.")
    outage: OutageSettings = Field(
        default_factory=OutageSettings, description="While Redis does not answer."
    )
    reservation_ms: DurationMs = duration(
        "60s",
        "reservation",
        "How long a charge that waits for its answer outlives a worker that was killed.",
    )
    drain_ms: DurationOrZeroMs = duration(
        "10s", "drain", "How long requests in flight may take to finish at shutdown."
    )
    drain_delay_ms: DurationOrZeroMs = duration(
        "0s", "drain_delay", "How long it is not ready, but serves, before it stops accepting."
    )


class ControlSettings(Section):
    """The control plane: usage and management APIs, console, portal."""

    listen: Listen = preset(
        Address("127.0.0.1", 8081), "127.0.0.1:8081", None, "Address to listen on, host:port."
    )


class RetentionSettings(Section):
    """How long the ledger keeps what."""

    hours_ms: DurationMs = duration(
        "90d", "hours", "Hours are kept so long, 62d at least; then their months become days."
    )

    @field_validator("hours_ms")
    @classmethod
    def _whole_months(cls, hours_ms: int) -> int:
        if hours_ms < MIN_HOURS_MS:
            raise ValueError(
                "too short: windows and late answers are worked out from hours; write 62d or more"
            )
        return hours_ms


class ReconcilerSettings(Section):
    """The background process that carries counts into the ledger."""

    lease_ms: DurationMs = duration(
        "5s", "lease", "Of several reconcilers one works; another takes over after this."
    )
    idle_after_ms: DurationMs = duration(
        "1d", "idle_after", "A subject that was idle so long leaves Redis, 1h at least."
    )
    seal_after_ms: DurationMs = duration(
        "5m", "seal_after", "How long after its end a period is sealed, to let late answers in."
    )
    retention: RetentionSettings = Field(
        default_factory=RetentionSettings, description="How long the ledger keeps what."
    )

    @field_validator("idle_after_ms")
    @classmethod
    def _not_too_soon(cls, idle_after_ms: int) -> int:
        if idle_after_ms < MIN_IDLE_MS:
            raise ValueError("too short: bursts and windows would be forgotten; write 1h or more")
        return idle_after_ms

    flush_interval_ms: DurationMs = duration(
        "1s", "flush_interval", "Time between two flushes of live counters to the ledger."
    )
    batch: Count = preset(1_000, 1_000, None, "Subjects flushed in one transaction at most.")


class RedisSettings(Section):
    """Redis or Valkey: the live counters."""

    url: Annotated[str | None, BeforeValidator(store_url(REDIS_SCHEMES))] = Field(
        default=None,
        repr=False,  # may hold a password
        description="redis://, rediss:// or unix:// URL of one server, or valkey:// or valkeys://; "
        "unset, `tallygate up` embeds one.",
    )
    timeout_ms: DurationMs = duration(
        "50ms", "timeout", "A check that takes longer counts as an outage: 503."
    )


class PostgresSettings(Section):
    """Postgres: the system of record."""

    url: Annotated[str | None, BeforeValidator(store_url(POSTGRES_SCHEMES))] = Field(
        default=None,
        repr=False,  # may hold a password
        description="postgresql:// URL; unset, `tallygate up` embeds a server.",
    )
    pool: Count = preset(4, 4, None, "Connections a process holds at most.")
    timeout_ms: DurationMs = duration("5s", "timeout", "Longest wait for one statement.")


class LogSettings(Section):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is written."
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto is console on a terminal, json elsewhere."
    )


class SecretSettings(Section):
    """Secrets. Give them as ${VARIABLE}, not in the file."""

    key_pepper: Annotated[SecretStr | None, BeforeValidator(empty_as_none)] = Field(
        default=None, description="Mixed into the hash of every API key; changing it voids them."
    )


class TelemetrySettings(Section):
    """How the processes expose metrics."""

    metrics_dir: Annotated[str | None, BeforeValidator(empty_as_none)] = Field(
        default=None,
        description="Directory in which workers share their metrics; unset: a new one.",
    )


class Config(Section):
    """The whole of `config.yaml`."""

    gateway: GatewaySettings = Field(
        default_factory=GatewaySettings, description="The proxy in front of the APIs."
    )
    control: ControlSettings = Field(
        default_factory=ControlSettings, description="Usage and management APIs, console, portal."
    )
    reconciler: ReconcilerSettings = Field(
        default_factory=ReconcilerSettings, description="The background process."
    )
    redis: RedisSettings = Field(default_factory=RedisSettings, description="The live counters.")
    postgres: PostgresSettings = Field(
        default_factory=PostgresSettings, description="The system of record."
    )
    log: LogSettings = Field(default_factory=LogSettings, description="Logs.")
    secrets: SecretSettings = Field(
        default_factory=SecretSettings, description="Secrets, as ${VARIABLE}."
    )
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings, description="Metrics.")
    meters: dict[Name, MeterSpec] = Field(
        default_factory=dict, description="What is counted; `requests` exists undeclared."
    )
    upstreams: dict[Name, UpstreamSpec] = Field(
        default_factory=dict, description="Where admitted requests go."
    )
    routes: tuple[RouteSpec, ...] = Field(
        default=(), description="What requests match; the first that matches is taken."
    )
    plans: dict[Name, PlanSpec] = Field(
        default_factory=dict, description="What is sold: named sets of limits."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        # `gateway:` with every line under it commented out reads as null: all defaults.
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data
