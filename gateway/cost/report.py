"""What became of each estimate: why a request was charged what it was charged.

Each one is a line at level debug, and part of the access log's; an estimate that stands because of
what the upstream sent is a warning, one a minute for a route, meter and reason.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from decimal import Decimal

from core import clock
from core.telemetry import logs
from core.telemetry.local import LocalCounter
from gateway.cost.tap import Cost

_log = logs.get_logger()

_QUIET_S = 60


class CostReport:
    """`settled_total` counts (meter, source, result); `units_total` (meter, which), in units."""

    def __init__(
        self,
        settled_total: LocalCounter | None = None,
        units_total: LocalCounter | None = None,
    ) -> None:
        self._settled = settled_total
        self._units = units_total
        self._told: dict[tuple[str, str, str], float] = {}

    def settled(self, route: str, subject: str, request_id: str, costs: Sequence[Cost]) -> None:
        """The costs of one request, once they are known."""
        debug = _log.is_enabled_for(logging.DEBUG)
        for rule, units, result in costs:
            if self._settled is not None:
                self._settled.inc(rule.meter, rule.source, result)
            if self._units is not None:
                self._units.add(rule.estimate, rule.meter, "estimated")
                self._units.add(units, rule.meter, "charged")
            if debug:
                _log.debug(
                    "cost_settled",
                    request_id=request_id,
                    route=route,
                    subject=subject,
                    **described(Cost(rule, units, result)),
                )
            if result.startswith("kept_"):
                self._warn(route, subject, request_id, Cost(rule, units, result))

    def _warn(self, route: str, subject: str, request_id: str, cost: Cost) -> None:
        key = (route, cost.rule.meter, cost.result)
        now = clock.monotonic()
        if now < self._told.get(key, 0.0):
            return
        self._told[key] = now + _QUIET_S
        _log.warning(
            "cost_estimate_kept",
            request_id=request_id,
            route=route,
            subject=subject,
            **described(cost),
        )


def described(cost: Cost) -> dict[str, str]:
    """One cost as fields of a log line, in the meter's unit."""
    rule = cost.rule
    return {
        "meter": rule.meter,
        "estimate": _quantity(rule.estimate, rule.decimals),
        "charged": _quantity(cost.units, rule.decimals),
        "source": rule.source,
        "result": cost.result,
    }


def _quantity(units: int, decimals: int) -> str:
    return format(Decimal(units).scaleb(-decimals), "f")
