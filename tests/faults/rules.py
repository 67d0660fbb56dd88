"""What is sold in a round, what a request on each route costs, and which rules are in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

REDIS_TIMEOUT_S = 0.25
LEASE_S = 3
# How long a charge that waits for its answer outlives a killed worker.
RESERVATION_S = 2


@dataclass(frozen=True)
class Switches:
    """Rules that each part of the system adds; the tests of the check take them one at a time.

    Attributes:
        exact_503: a request that was answered 503 is not in the ledger, whatever was lost.
        reservations: routes charge by the answer, as their `charge` says.
        spool: routes with `outage: open` and `local` take part.
        restored: an older copy of Redis' data is repaired from the ledger before it serves.
    """

    exact_503: bool = False
    reservations: bool = False
    spool: bool = False
    restored: bool = False


EVERYTHING = Switches(exact_503=True, reservations=True, spool=True, restored=True)

Charge = Literal["on_admit", "on_response", "2xx"]


@dataclass(frozen=True)
class Route:
    """`costs` by meter; what `estimates` has is charged until the answer says what it cost."""

    prefix: str
    costs: Mapping[str, int]
    charge: Charge = "on_admit"
    more: str = ""
    estimates: Mapping[str, int] = field(default_factory=dict)

    def meter(self, name: str) -> str:
        """A meter as the configuration has it."""
        if name in self.estimates:
            return f"{name}: {{estimate: {self.estimates[name]}, from: {{header: x-usage-cost}}}}"
        return f"{name}: {self.costs[name]}"


@dataclass(frozen=True)
class Plan:
    """What the check knows of a plan.

    Attributes:
        limits: YAML in flow style, one a line.
        quotas: height of the billing quota of each meter; QUOTA_NAMES has their names.
        blocks: whether the quota on requests refuses.
        rate: requests a second and burst of the rate limit.
        slots: height of the concurrency limit.
    """

    limits: str
    quotas: Mapping[str, int]
    blocks: bool = False
    rate: tuple[int, int] | None = None
    slots: int | None = None


@dataclass(frozen=True)
class Traffic:
    """Requests of one subscription: its plan, paths after the host, share of all requests."""

    plan: str
    paths: tuple[str, ...]
    share: int
    switch: str = ""


ROUTES = {
    "heavy": Route("/heavy/", {"requests": 1, "credits": 5}),
    "light": Route("/light/", {"requests": 1, "credits": 2}),
    "answered": Route("/answered/", {"requests": 1}, "on_response", "charge: on_response"),
    "paid": Route("/paid/", {"requests": 1, "credits": 3}, "2xx", 'charge: {status: ["2xx"]}'),
    # it costs more than was estimated, so that no total ever falls
    "metered": Route("/metered/", {"requests": 1, "credits": 4}, estimates={"credits": 1}),
    "open": Route("/open/", {"requests": 1}, more="outage: open"),
    "local": Route("/local/", {"requests": 1}, more="outage: local"),
    "api": Route("/api/", {"requests": 1}),
}

_WIDE = 1_000_000
PLANS = {
    "quota": Plan("monthly: {period: billing, limit: 80}", {"requests": 80}, blocks=True),
    "overage": Plan(
        """monthly: {period: billing, limit: 60, action: overage}
        credits: {period: billing, meter: credits, limit: 250, action: overage}""",
        {"requests": 60, "credits": 250},
    ),
    "rated": Plan(
        f"""fast: {{rate: 30/s, burst: 10}}
        monthly: {{period: billing, limit: {_WIDE}}}""",
        {"requests": _WIDE},
        rate=(30, 10),
    ),
    "slots": Plan(
        f"""in_flight: {{concurrency: 2, lease: {LEASE_S}s}}
        monthly: {{period: billing, limit: {_WIDE}}}""",
        {"requests": _WIDE},
        slots=2,
    ),
    "warned": Plan(
        f"""monthly: {{period: billing, limit: 50, action: warn, thresholds: [20, 50, 100]}}
        per_day: {{window: 1d, limit: {_WIDE}}}
        per_year: {{period: year, limit: {_WIDE}}}""",
        {"requests": 50},
    ),
    "wide": Plan(
        f"""monthly: {{period: billing, limit: {_WIDE}}}
        credits: {{period: billing, meter: credits, limit: {_WIDE}}}""",
        {"requests": _WIDE, "credits": _WIDE},
    ),
}
THRESHOLDS = {"warned": (20, 50, 100)}
DEFAULT_THRESHOLDS = (80, 90, 95, 100)
# The quota on each meter is called so in every plan.
QUOTA_NAMES = {"requests": "monthly", "credits": "credits"}

TRAFFIC = (
    Traffic("quota", ("/api/x",), 12),
    Traffic("quota", ("/api/x", "/api/status?code=500"), 12),
    Traffic("overage", ("/heavy/x", "/light/x"), 12),
    Traffic("rated", ("/api/x",), 10),
    Traffic("slots", ("/api/slow?ms=20",), 12),
    Traffic("warned", ("/api/x", "/api/status?code=500"), 6),
    Traffic("wide", ("/api/x", "/heavy/x", "/light/x", "/api/slow?ms=5"), 12),
    Traffic("wide", ("/answered/x", "/answered/status?code=500", "/answered/slow?ms=10"), 8),
    Traffic("wide", ("/paid/x", "/paid/status?code=500", "/paid/slow?ms=10"), 8),
    Traffic("wide", ("/metered/costs?is=4",), 8),
    Traffic("wide", ("/open/x",), 6, "spool"),
    Traffic("wide", ("/local/x",), 6, "spool"),
)


def traffic(switches: Switches) -> list[Traffic]:
    """Whose requests there are in a round."""
    return [one for one in TRAFFIC if not one.switch or getattr(switches, one.switch)]


def route_of(path: str) -> Route:
    """The route that a path matches."""
    return ROUTES[path.split("/")[1]]


def thresholds_of(plan: str) -> tuple[int, ...]:
    """Percentages at which each quota of the plan fires an event."""
    return THRESHOLDS.get(plan, DEFAULT_THRESHOLDS)


def config(switches: Switches) -> str:
    """The configuration of all processes; `${SPOOL_DIR}` is needed with `spool` only."""
    spool = '  outage: {spool_dir: "${SPOOL_DIR}", instances: 2}\n' if switches.spool else ""
    routes = "".join(
        f"  - {{match: {{path: {route.prefix}*}}, upstream: api, meters: "
        f"{{{', '.join(map(route.meter, route.costs))}}}"
        f"{', ' + route.more if route.more else ''}}}\n"
        for route in ROUTES.values()
        if switches.spool or not route.more.startswith("outage")
    )
    plans = "".join(
        f"  {name}:\n    limits:\n"
        + "".join(f"      {line.strip()}\n" for line in plan.limits.splitlines())
        for name, plan in PLANS.items()
    )
    return f"""
gateway:
  drain: 2s
  reservation: {RESERVATION_S}s
{spool}redis: {{url: "${{TALLYGATE_REDIS_URL}}", timeout: {round(REDIS_TIMEOUT_S * 1000)}ms}}
postgres: {{url: "${{TALLYGATE_POSTGRES_URL}}", timeout: 1s}}
secrets: {{key_pepper: "${{TALLYGATE_KEY_PEPPER}}"}}
reconciler: {{flush_interval: 50ms, lease: 1s}}
log: {{format: json, level: warning}}
meters:
  credits: {{unit: credit}}
upstreams:
  api: {{urls: ["${{UPSTREAM}}"], timeout: {{connect: 1s, response: 5s}}}}
routes:
{routes}plans:
{plans}"""
