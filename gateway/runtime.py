"""A configuration snapshot, compiled for the worker: read once per request, replaced whole.

Upstream pools outlive a reload when their upstream did not change, so that a new limit does not
cost the upstreams their keep-alive connections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from core.admission.ledger import Catalogue
from core.admission.program import CalendarUse, Program, calendar_use, compile_program
from core.admission.settlement import cap_of
from core.config import Snapshot
from core.config.models import KeySettings
from core.policy import OutageMode, Plan, Route, Upstream
from core.rules import StaticAnswer
from gateway.admission.limiter import Admission
from gateway.answers import cors
from gateway.answers.cors import CorsRules
from gateway.answers.headers import SERVER, Headers, PlanHeaders
from gateway.answers.verdict import policy_of
from gateway.auth.extract import Source
from gateway.cost.charge import CostOnRoute, kept_at_head
from gateway.forwarded import TrustedProxies
from gateway.http.message import Header
from gateway.outage.decide import OutageRules
from gateway.outage.local import compile_local
from gateway.paths import Lookalikes
from gateway.proxy.balance import request_key
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.request import RequestRules
from gateway.proxy.rewrite import Fields, HeaderEdits, path_edit
from gateway.router import Router
from gateway.websocket.metering import Metering


@dataclass(frozen=True, slots=True)
class PlanOnRoute:
    """A plan as it applies to one route."""

    plan: Plan
    admission: Admission
    headers: PlanHeaders
    plain_headers: Callable[[Sequence[int]], Headers]
    metering: Metering | None = None  # of what goes through WebSockets


class RouteRuntime:
    """A route with everything a request on it needs."""

    __slots__ = (
        "_edits",
        "_key",
        "_path",
        "_rules",
        "_trusted",
        "alters_answers",
        "anonymous",
        "balance_key",
        "cors",
        "default_server",
        "drop_response_headers",
        "lookalikes",
        "plans",
        "pool",
        "response_fields",
        "route",
        "websocket",
    )

    def __init__(
        self,
        route: Route,
        pool: UpstreamPool,
        plans: Mapping[str, PlanOnRoute],
        trusted: TrustedProxies,
        key: KeySettings,
        drop_response_headers: frozenset[bytes] = frozenset(),
        lookalikes: Lookalikes | None = None,
    ) -> None:
        rules = route.rules
        self.lookalikes = lookalikes
        self.cors = CorsRules(rules.cors, key.headers) if rules.cors is not None else None
        self.response_fields: Fields | None = None
        self.default_server: Header | None = SERVER
        self.drop_response_headers = drop_response_headers
        if self.cors is not None:
            self.drop_response_headers |= cors.REPLACED
        if rules.response is not None:
            changes = HeaderEdits(rules.response)
            self.drop_response_headers |= changes.dropped
            self.response_fields = changes.fields
            if b"server" in changes.dropped:
                self.default_server = None
        self.alters_answers = self.cors is not None or self.response_fields is not None
        self._edits = HeaderEdits(rules.request) if rules.request is not None else None
        self._path = path_edit(route.strip_prefix, rules.add_prefix, rules.rewrite)
        self.route = route
        self.websocket = route.websocket
        self.pool = pool
        self.plans = plans
        self.anonymous = plans[route.plan] if route.keyless else None
        # What its upstream hashes of a request; None where it does not.
        self.balance_key = request_key(pool.upstream.hash_by, trusted)
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
        query = (self._key.query,) if self._key.query and not route.forward_key else ()
        drops = header is not None and not route.forward_key
        return RequestRules(
            path=self._path,
            drop_headers=(header,) if drops and header is not None else (),
            key_headers=() if route.forward_key else [name.encode() for name in self._key.headers],
            drop_query=() if route.keyless else query,
            key_query=query if route.keyless else (),
            trusted=self._trusted,
            identity=any(rule.json or rule.sse for rule in route.actual),
            edits=self._edits,
            route=route.name,
            host=route.rules.host,
            preserve_host=route.rules.preserve_host,
            max_body=route.rules.max_body,
        )


class StaticRoute:
    """A route that answers by itself. `fields` are those of the answer."""

    __slots__ = ("answer", "cors", "fields", "lookalikes", "route")

    def __init__(self, route: Route, answer: StaticAnswer, key: KeySettings) -> None:
        self.route = route
        self.answer = answer
        self.fields = Fields(answer.fields)
        self.lookalikes: Lookalikes | None = None  # it is served here, and read in one way
        rules = route.rules
        self.cors = CorsRules(rules.cors, key.headers) if rules.cors is not None else None


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
        routes = [(route, self._route(route, calendars, headers)) for route in snapshot.routes]
        self.router: Router[RouteRuntime | StaticRoute] = Router(routes)
        # By name: what goes on longer than a configuration finds its route again.
        self.routes = {r.name: value for r, value in routes if isinstance(value, RouteRuntime)}
        self.has_cors = any(route.rules.cors is not None for route in snapshot.routes)
        self.match_host = self.router.by_host

    def _outage(self, route: Route, plan: Plan, program: Program) -> OutageRules:
        """What is admitted on a route while Redis is away."""
        local = None
        if route.outage is OutageMode.LOCAL:
            local = compile_local(
                program.limits, program.costs, self.snapshot.meters, self._processes
            )
        caps = {name: cap for name in program.costs if (cap := cap_of(plan, name)) is not None}
        # Frames reserve nothing: they wait for no answer, whatever their route does.
        return OutageRules(route.outage, local, caps, route.reserve and program.reserve_ms > 0)

    def _route(
        self, route: Route, calendars: CalendarUse, headers: Mapping[str, PlanHeaders]
    ) -> RouteRuntime | StaticRoute:
        snapshot = self.snapshot
        key = snapshot.settings.gateway.key
        if route.rules.answer is not None:
            return StaticRoute(route, route.rules.answer, key)
        plans = {}
        for name, plan in snapshot.plans.items():
            if route.keyless and name != route.plan:
                continue
            admission = self._admission(route, plan, calendars, route.costs)
            plans[name] = PlanOnRoute(
                plan,
                admission,
                headers[name],
                headers[name].plain(admission.policies),
                self._metering(route, plan, calendars),
            )
        pool = self.pools[snapshot.upstreams[route.upstream]]
        earlier = snapshot.routes[: snapshot.routes.index(route)]
        return RouteRuntime(
            route,
            pool,
            plans,
            self.trusted,
            key,
            self.drop_response_headers,
            Lookalikes.of(route, earlier),
        )

    def _admission(
        self,
        route: Route,
        plan: Plan,
        calendars: CalendarUse,
        costs: Mapping[str, int],
        *,
        within: bool = False,
    ) -> Admission:
        """What a request asks; or, `within` one that was admitted, what goes through it."""
        snapshot = self.snapshot
        actual = () if within else route.actual
        reserves = (route.reserve and not within) or bool(actual)
        program = compile_program(
            plan,
            costs,
            snapshot.meters,
            calendars,
            durable=not route.keyless,
            reserve_ms=snapshot.settings.gateway.reservation_ms if reserves else 0,
            keep=kept_at_head(route) if actual and not route.reserve else None,
            corrected=[rule.meter for rule in actual],
            slots=not within,
        )
        return Admission(
            program,
            tuple(policy_of(limit, snapshot.meters) for limit in program.limits),
            plan.interval_months,
            self._outage(route, plan, program),
            route.charged,
            CostOnRoute(route, program.watch, program.watch_calendar) if actual else None,
        )

    def _metering(self, route: Route, plan: Plan, calendars: CalendarUse) -> Metering | None:
        if route.websocket is None or not route.websocket.costs:
            return None
        compiled = partial(self._admission, route, plan, calendars, within=True)
        return Metering(route.websocket.costs, compiled)
