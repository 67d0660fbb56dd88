"""A configuration snapshot, compiled for the worker: read once per request, replaced whole.

Upstream pools outlive a reload when their upstream did not change, so that a new limit does not
cost the upstreams their keep-alive connections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.admission.program import CalendarUse, calendar_use, compile_program
from core.admission.seeder import Catalogue
from core.config import Snapshot
from core.policy import Plan, Route, Upstream
from gateway.admission.limiter import Admission
from gateway.answers.headers import PlanHeaders
from gateway.answers.verdict import policy_of
from gateway.auth.extract import Source
from gateway.forwarded import TrustedProxies
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestRules
from gateway.router import Router


@dataclass(frozen=True, slots=True)
class PlanOnRoute:
    """A plan as it applies to one route."""

    plan: Plan
    admission: Admission
    headers: PlanHeaders


class RouteRuntime:
    """A route with everything a request on it needs."""

    __slots__ = ("_rules", "_trusted", "anonymous", "plans", "pool", "route")

    def __init__(
        self,
        route: Route,
        pool: UpstreamPool,
        plans: Mapping[str, PlanOnRoute],
        trusted: TrustedProxies,
    ) -> None:
        self.route = route
        self.pool = pool
        self.plans = plans
        self.anonymous = plans[route.plan] if route.keyless else None
        self._trusted = trusted
        self._rules: dict[tuple[bytes | None, bytes | None], RequestRules] = {}

    def rules(self, source: Source | None) -> RequestRules:
        """How to rewrite a request whose key came from `source`: it is not sent upstream."""
        header = query = None
        if source is not None and not self.route.forward_key:
            header, query = source.header, source.query
        rules = self._rules.get((header, query))
        if rules is None:
            rules = self._rules[header, query] = RequestRules(
                strip_prefix=self.route.strip_prefix,
                drop_headers=(header,) if header else (),
                drop_query=(query.decode(),) if query else (),
                trusted=self._trusted,
            )
        return rules


class Runtime:
    """Everything compiled from one snapshot. `pools` is by upstream."""

    def __init__(self, snapshot: Snapshot, pools: Mapping[Upstream, UpstreamPool]) -> None:
        self.snapshot = snapshot
        self.pools = {
            upstream: pools.get(upstream) or UpstreamPool(upstream)
            for upstream in snapshot.upstreams.values()
        }
        calendars = calendar_use(snapshot.plans.values())
        self.catalogue = Catalogue(snapshot.meters, calendars)
        self.trusted = TrustedProxies(
            str(network) for network in snapshot.settings.gateway.trusted_proxies
        )
        flags = snapshot.settings.gateway.headers
        # Limit fields of an upstream would contradict ours.
        self.drop_response_headers: frozenset[bytes] = frozenset(
            (
                *((b"ratelimit", b"ratelimit-policy") if flags.ratelimit else ()),
                *(
                    (b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset")
                    if flags.legacy
                    else ()
                ),
            )
        )
        headers = {
            name: PlanHeaders(plan, snapshot.meters, ratelimit=flags.ratelimit, legacy=flags.legacy)
            for name, plan in snapshot.plans.items()
        }
        self.router: Router[RouteRuntime] = Router(
            (route, self._route(route, calendars, headers)) for route in snapshot.routes
        )
        self.match_host = self.router.by_host

    def _route(
        self, route: Route, calendars: CalendarUse, headers: Mapping[str, PlanHeaders]
    ) -> RouteRuntime:
        snapshot = self.snapshot
        plans = {}
        for name, plan in snapshot.plans.items():
            if route.keyless and name != route.plan:
                continue
            program = compile_program(
                plan, route.costs, snapshot.meters, calendars, durable=not route.keyless
            )
            policies = tuple(policy_of(limit, snapshot.meters) for limit in program.limits)
            admission = Admission(program, policies, plan.interval_months)
            plans[name] = PlanOnRoute(plan, admission, headers[name])
        pool = self.pools[snapshot.upstreams[route.upstream]]
        return RouteRuntime(route, pool, plans, self.trusted)
