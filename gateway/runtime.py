"""A configuration snapshot, compiled for the worker: read once per request, replaced whole.

Upstream pools outlive a reload when their upstream did not change, so that a new limit does not
cost the upstreams their keep-alive connections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.admission.ledger import Catalogue
from core.admission.program import CalendarUse, Program, calendar_use, compile_program
from core.admission.settlement import cap_of
from core.config import Snapshot
from core.config.models import KeySettings
from core.policy import OutageMode, Plan, Route, Upstream
from gateway.admission.limiter import Admission
from gateway.answers.headers import Headers, PlanHeaders
from gateway.answers.verdict import policy_of
from gateway.auth.extract import Source
from gateway.forwarded import TrustedProxies
from gateway.outage.decide import OutageRules
from gateway.outage.local import compile_local
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestRules
from gateway.router import Router


@dataclass(frozen=True, slots=True)
class PlanOnRoute:
    """A plan as it applies to one route."""

    plan: Plan
    admission: Admission
    headers: PlanHeaders
    plain_headers: Callable[[Sequence[int]], Headers]


class RouteRuntime:
    """A route with everything a request on it needs."""

    __slots__ = ("_key", "_rules", "_trusted", "anonymous", "plans", "pool", "route")

    def __init__(
        self,
        route: Route,
        pool: UpstreamPool,
        plans: Mapping[str, PlanOnRoute],
        trusted: TrustedProxies,
        key: KeySettings,
    ) -> None:
        self.route = route
        self.pool = pool
        self.plans = plans
        self.anonymous = plans[route.plan] if route.keyless else None
        self._trusted = trusted
        self._key = key
        self._rules: dict[bytes | None, RequestRules] = {}

    def rules(self, source: Source | None) -> RequestRules:
        """How to rewrite a request whose key came from `source`; None on a keyless route.

        No key of ours goes upstream unless the route says so: neither the one that was used nor
        one beside it.
        """
        header = None if source is None else source.header
        rules = self._rules.get(header)
        if rules is None:
            rules = self._rules[header] = self._compile(header)
        return rules

    def _compile(self, header: bytes | None) -> RequestRules:
        route = self.route
        if route.forward_key:
            return RequestRules(strip_prefix=route.strip_prefix, trusted=self._trusted)
        query = (self._key.query,) if self._key.query else ()
        return RequestRules(
            strip_prefix=route.strip_prefix,
            drop_headers=() if header is None else (header,),
            key_headers=[name.encode() for name in self._key.headers],
            drop_query=() if route.keyless else query,
            key_query=query if route.keyless else (),
            trusted=self._trusted,
        )


class Runtime:
    """Everything compiled from one snapshot.

    `pools` is by upstream, `workers` the number of them on this host.
    """

    def __init__(
        self, snapshot: Snapshot, pools: Mapping[Upstream, UpstreamPool], workers: int = 1
    ) -> None:
        self.snapshot = snapshot
        self._processes = snapshot.settings.gateway.outage.instances * workers
        self.pools = {
            upstream: pools.get(upstream) or UpstreamPool(upstream)
            for upstream in snapshot.upstreams.values()
        }
        calendars = calendar_use(snapshot.plans.values())
        self.catalogue = Catalogue(snapshot.meters, calendars, snapshot.plans)
        self.trusted = TrustedProxies(
            str(network) for network in snapshot.settings.gateway.trusted_proxies
        )
        flags = snapshot.settings.gateway.headers
        # Of an upstream: its limit fields would contradict ours, and there is one request id.
        self.drop_response_headers: frozenset[bytes] = frozenset(
            (
                b"x-request-id",
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

    def _outage(self, route: Route, plan: Plan, program: Program) -> OutageRules:
        """What is admitted on a route while Redis is away."""
        local = None
        if route.outage is OutageMode.LOCAL:
            local = compile_local(
                program.limits, program.costs, self.snapshot.meters, self._processes
            )
        caps = {name: cap for name in program.costs if (cap := cap_of(plan, name)) is not None}
        return OutageRules(route.outage, local, caps)

    def _route(
        self, route: Route, calendars: CalendarUse, headers: Mapping[str, PlanHeaders]
    ) -> RouteRuntime:
        snapshot = self.snapshot
        plans = {}
        for name, plan in snapshot.plans.items():
            if route.keyless and name != route.plan:
                continue
            program = compile_program(
                plan,
                route.costs,
                snapshot.meters,
                calendars,
                durable=not route.keyless,
                reserve_ms=snapshot.settings.gateway.reservation_ms if route.reserve else 0,
            )
            policies = tuple(policy_of(limit, snapshot.meters) for limit in program.limits)
            admission = Admission(
                program,
                policies,
                plan.interval_months,
                self._outage(route, plan, program),
                route.charged,
            )
            plans[name] = PlanOnRoute(plan, admission, headers[name], headers[name].plain(policies))
        pool = self.pools[snapshot.upstreams[route.upstream]]
        return RouteRuntime(route, pool, plans, self.trusted, snapshot.settings.gateway.key)
