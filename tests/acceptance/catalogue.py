"""Configurations of the acceptance tests.

Windows are a year long and periods a month, so that no boundary falls into a test; see
`far_from_midnight` for the calendar day.
"""

from __future__ import annotations

from datetime import UTC, datetime

from tests.support import wait_until

_CONFIG = """
gateway:
  drain: 5s
  client: {head_timeout: 60s}  # tests open connections before they use them, slowly when it is busy
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: %(timeout)s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms}
log: {format: json, level: warning}
meters:
  credits: {unit: credit}
upstreams:
  api: {urls: ["${UPSTREAM}"]}
routes:
  - {match: {path: /heavy/*}, upstream: api, meters: {requests: 1, credits: 5}}
  - {match: {path: /only/*, methods: [POST]}, upstream: api}
  - {match: {path: /public/*}, upstream: api, keyless: true, plan: anonymous}
  - {match: {path: /api/*}, upstream: api}
plans:
  anonymous:
    limits: {burst: {rate: 1/d, burst: 3}}
%(plans)s
"""

# Limits that never refuse here: whatever a refusal burns shows in them. They cover every algorithm
# but the one that refuses.
SPARE = """
      spare_rate: {rate: 100000/d, burst: 100000}
      spare_window: {window: 52w, limit: 100000}
      spare_sliding: {window: 52w, limit: 100000, sliding: true}
      spare_billing: {period: billing, limit: 100000}
      spare_year: {period: year, limit: 100000}
      spare_slots: {concurrency: 1000, lease: 30s}"""


def plan(name: str, limits: str, more: str = "") -> str:
    """One plan in YAML; `limits` in flow style, one a line."""
    lines = "".join(f"\n      {line.strip()}" for line in limits.strip().splitlines())
    return f"  {name}:{more}\n    limits:{lines}\n"


def config(plans: str, *, timeout: str = "5s") -> str:
    """A configuration with these plans.

    Args:
        timeout: of an admission. Long by default: on a busy machine a check that was counted and
            then timed out would be answered 503, and nothing here could be exact.
    """
    return _CONFIG % {"plans": plans, "timeout": timeout}


def far_from_midnight() -> None:
    """Waits for the new day when the old one ends within a minute (UTC)."""

    def far() -> bool:
        now = datetime.now(UTC)
        return (now.hour, now.minute) != (23, 59)

    wait_until(far, deadline_s=61, what="the new day")


EXACT = {
    "billing": "hard: {period: billing, limit: 1000}",
    "day": "hard: {period: day, limit: 1000}",
    "month": "hard: {period: month, limit: 1000}",
    "fixed": "hard: {window: 52w, limit: 1000}",
    "sliding": "hard: {window: 52w, limit: 1000, sliding: true}",
    "gcra": "hard: {rate: 1/d, burst: 1000}",
}

SHARED = config(
    "".join(plan(f"exact_{name}", limit + SPARE) for name, limit in EXACT.items())
    + plan("slots", "in_flight: {concurrency: 20, lease: 30s}" + SPARE)
    + plan(
        "blocked",
        """
        monthly: {period: billing, limit: 1500}
        credits: {period: billing, meter: credits, limit: 1000, action: warn}
        """,
    )
    + plan(
        "paid",
        """
        monthly: {period: billing, limit: 1000, action: overage}
        credits: {period: billing, meter: credits, limit: 2000, action: overage}
        """,
    )
    + plan("quota", "monthly: {period: billing, limit: 1000}")
    + plan("ten_thousand", "monthly: {period: billing, limit: 10000}")
    + plan("thousands", "monthly: {period: billing, limit: 100000}")
    + plan("doubled", "monthly: {period: billing, limit: 40}")
    + plan("small", "monthly: {period: billing, limit: 20}")
    + plan("over", "monthly: {period: billing, limit: 20, action: overage}")
    + plan("warned", "monthly: {period: billing, limit: 20, action: warn, thresholds: [50]}")
    + plan(
        "shadow",
        """
        trial: {window: 52w, limit: 2, enforce: false}
        monthly: {period: billing, limit: 20}
        """,
    )
)
