"""One request from its match to its answer: match, authenticate, decide, relay, count.

The order matters for money: a request that is refused for any reason is not counted, and one that
reaches an upstream was counted durably before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from typing import Any

from core import clock, ids
from core.errors import StoreUnavailableError
from core.policy import Status
from core.telemetry import logs
from core.telemetry.local import LocalMetrics
from gateway.admission.blocked import Refused
from gateway.admission.limiter import Decision, Limiter
from gateway.answers import problems
from gateway.answers.client import client_problem
from gateway.answers.headers import SERVER
from gateway.answers.problems import Problem
from gateway.answers.repeat import RepeatedRefusal, holds_s
from gateway.answers.upstream import upstream_problem
from gateway.auth import Authenticator
from gateway.auth import Outcome as Auth
from gateway.auth.keycache import Subscription
from gateway.cost.report import described
from gateway.forwarded import client_group
from gateway.http.errors import (
    BadRequest,
    ClientDisconnected,
    PayloadTooLarge,
    RequestTimeout,
)
from gateway.http.exchange import Exchange
from gateway.http.message import Header, Request
from gateway.identity import decision_id_of, sent_id
from gateway.matching import Direct, Matcher, Refusal
from gateway.proxy.errors import ProxyError
from gateway.proxy.relay import Outcome, RelayResult, relay
from gateway.proxy.request import RequestHead
from gateway.proxy.rewrite import Facts
from gateway.proxy.websocket.handshake import HandshakeError
from gateway.runtime import PlanOnRoute, RouteRuntime, Runtime
from gateway.websocket.serve import WebSockets
from gateway.websocket.serve import problem as socket_problem

# What a client is told when no decision can be had: short, since a restart of Redis is.
_OUTAGE_RETRY_S = 1


class Responder:
    """Answers requests under one runtime; made anew for each configuration."""

    def __init__(
        self,
        runtime: Runtime,
        authenticator: Authenticator,
        limiter: Limiter,
        metrics: LocalMetrics,
        sockets: WebSockets,
    ) -> None:
        self.runtime = runtime
        self._match = Matcher(runtime).match
        self._authenticator = authenticator
        self._limiter = limiter
        self._metrics = metrics
        self._sockets = sockets
        self._upstream_seconds = {
            upstream.name: metrics.upstream(upstream.name) for upstream in runtime.pools
        }
        self._access_log = runtime.snapshot.settings.gateway.access_log
        # Unique over workers and restarts, and far cheaper than a random identifier a request.
        self._id_prefix = f"req_{ids.ulid()}_"
        self._id_numbers = count(1)

    async def __call__(self, exchange: Exchange) -> None:
        """One request. Exactly one outcome is recorded for it, whatever happens."""
        metrics = self._metrics
        request = exchange.request
        # Ours identifies leases and decisions. What everybody quotes is the client's own, if it
        # sent one: the same in the answer, in our log and upstream.
        own_id = f"{self._id_prefix}{next(self._id_numbers):x}"
        request_id = sent_id(request) or own_id
        route_name = plan_name = subject = ""
        outcome = "error"
        decision: Decision | None = None
        matched: RouteRuntime | None = None
        metrics.in_flight += 1
        try:
            route = matched = self._match(request, request_id)
            route_name = route.route.name
            shake = None
            if route.websocket is not None:
                shake = self._sockets.asked(route, request)
            if route.anonymous is not None:
                on_route = route.anonymous
                plan_name = on_route.plan.name
                client = client_group(self.runtime.trusted.client_ip(request.peer, request.headers))
                subject = f"ip:{plan_name}:{client}"
                source = subscription = None
            else:
                subscription, source = await self._authenticate(request, request_id)
                subject = subscription.id
                on_route = self._plan(route, subscription, request_id)
                plan_name = subscription.plan
            admission = on_route.admission
            if admission.blocked and (again := admission.blocked.find(subject)) is not None:
                outcome = "limited"
                self._repeat(again, on_route, route, exchange, subject, request_id, own_id)
                return
            named = "" if subscription is None else subject
            head = self._head(route, source, request, request_id, plan_name, named)
            if route.pool.refusing is not None:
                self._ask_upstream(route, request_id)
            started = clock.monotonic()
            if subscription is None:
                decision = await self._limiter.admit_anonymous(admission, subject, own_id)
            else:
                decision = await self._limiter.admit(admission, subscription, own_id)
            metrics.admission.observe(clock.monotonic() - started)
            if decision.numbers:
                limit_headers = on_route.plain_headers(decision.numbers)
            else:
                limit_headers = on_route.headers.of(decision.states)
            if not decision.admitted:
                raise self._limited(decision, limit_headers, own_id, request_id)
            limit_headers.append((b"x-request-id", request_id.encode()))
            charge = decision.charge
            if route.alters_answers:
                limit_headers += self._added(route, request, request_id, plan_name, subject)
            started = clock.monotonic()
            if shake is not None:
                result = await self._sockets.relay(
                    exchange, shake, route=route, on_route=on_route, head=head, decision=decision,
                    subject=subject if subscription is None else subscription,
                    own_id=own_id, limit_headers=limit_headers,
                )  # fmt: skip
                outcome = self._relayed(result, route, decision, request_id)
                return
            result = await relay(
                exchange,
                pool=route.pool,
                head=head,
                extra_response_headers=limit_headers,
                drop_response_headers=route.drop_response_headers,
                default_server=route.default_server,
                before_start=charge.answered if charge is not None else None,
                balance_key=b"" if route.balance_key is None else route.balance_key(request),
                tap=charge.tap(request_id) if charge is not None else None,
            )
            outcome = self._relayed(result, route, decision, request_id)
        except Direct as direct:
            route_name, outcome = direct.route, direct.outcome
            self._answer(direct.answer, exchange, request_id)
        except Refusal as refusal:
            outcome = refusal.outcome
            self._refuse(refusal, exchange, subject, matched, plan_name, request_id, own_id)
        except StoreUnavailableError as error:
            outcome = "outage"
            problem = problems.temporary_reduced_capacity(_OUTAGE_RETRY_S, request_id=request_id)
            self._refuse(
                Refusal(problem, outcome, str(error)),
                exchange, subject, matched, plan_name, request_id, own_id,
            )  # fmt: skip
        except ClientDisconnected:
            outcome = "client_gone"
        except (BadRequest, RequestTimeout, PayloadTooLarge) as error:
            outcome = "bad_request"
            problem = client_problem(error, route.route.rules.max_body, request_id=request_id)
            self._refuse(
                Refusal(problem, outcome, error.code),
                exchange, subject, matched, plan_name, request_id, own_id,
            )  # fmt: skip
        except HandshakeError as error:
            outcome = "bad_request" if error.status < 500 else "upstream_error"
            problem = socket_problem(error, request_id)
            self._refuse(
                Refusal(problem, outcome, error.code),
                exchange, subject, matched, plan_name, request_id, own_id,
            )  # fmt: skip
        except ProxyError as error:
            outcome = "upstream_error"
            upstream = route.pool.upstream
            metrics.upstream_errors.inc(upstream.name, error.code)
            self._upstream_seconds[upstream.name].observe(clock.monotonic() - started)
            self._refuse(
                Refusal(upstream_problem(error, upstream, request_id=request_id), outcome,
                        f"{error.code}: {error}"),
                exchange, subject, matched, plan_name, request_id, own_id,
            )  # fmt: skip
        except asyncio.CancelledError:
            outcome = "shutdown"  # longer than the drain: the server cuts it off
            raise
        except Exception:
            logs.get_logger().exception("request_failed", request_id=request_id, route=route_name)
            if not exchange.started:
                problem = problems.internal_error(request_id=request_id)
                self._answer(problem, exchange, request_id, _cors(matched, request))
        finally:
            # First of all: a slot that stays taken would refuse others.
            if decision is not None and not decision.numbers:
                self._limiter.release(decision)
            if not exchange.ended:
                exchange.abort()
            metrics.in_flight -= 1
            metrics.record(route_name, plan_name, outcome)
            if self._access_log:
                logs.get_logger().info(
                    "request",
                    request_id=request_id,
                    method=request.method,
                    path=request.path,
                    route=route_name,
                    subject=subject,
                    plan=plan_name,
                    outcome=outcome,
                    **_costs(decision),
                )

    # Steps

    def _added(
        self, route: RouteRuntime, request: Request, request_id: str, plan: str, subscription: str
    ) -> list[Header]:
        """Fields that the route adds to its upstream's answers."""
        headers = route.cors.fields(request) if route.cors is not None else []
        if route.response_fields is not None:
            name = "" if route.route.keyless else subscription
            facts = Facts(
                request, request_id.encode(), self.runtime.trusted, route.route.name, plan, name
            )
            headers = [*headers, *route.response_fields.of(facts)]
        return headers

    async def _authenticate(self, request: Request, request_id: str) -> tuple[Subscription, Any]:
        headers, query = request.headers, request.query
        outcome, entry, source = self._authenticator.authenticate(headers, query)
        metrics = self._metrics
        if outcome is Auth.PENDING:
            outcome, entry, source = await self._authenticator.authenticate_slow(headers, query)
            metrics.key_cache_misses.inc("valid" if entry is not None else "invalid")
        elif entry is not None:
            metrics.key_cache_hits.inc("valid")
        elif outcome is not Auth.MISSING:
            metrics.key_cache_hits.inc("invalid")
        if outcome is Auth.OK:
            assert entry is not None
            return entry.subscription, source
        if outcome is Auth.UNAVAILABLE:
            raise StoreUnavailableError("the key is not cached and Postgres does not answer")
        if outcome is Auth.MISSING:
            problem, reason = problems.missing_key(request_id=request_id), "missing-key"
        elif outcome is Auth.EXPIRED:
            problem, reason = problems.expired_key(request_id=request_id), "expired-key"
        elif outcome is Auth.INACTIVE:
            problem, reason = problems.inactive_key(request_id=request_id), "inactive-key"
            raise Refusal(problem, "forbidden", reason)
        else:
            problem, reason = problems.invalid_key(request_id=request_id), "invalid-key"
        raise Refusal(problem, "unauthorized", reason)

    @staticmethod
    def _plan(route: RouteRuntime, subscription: Subscription, request_id: str) -> PlanOnRoute:
        on_route = route.plans.get(subscription.plan)
        if on_route is None:
            problem = problems.forbidden(
                "unknown-plan",
                "The subscription's plan is not in force. Its provider has to mend that.",
                request_id=request_id,
            )
            raise Refusal(problem, "forbidden", "unknown-plan")
        status = subscription.status
        if status is not Status.ACTIVE:
            code = on_route.plan.status_rule[status]
            if code is not None:
                problem = problems.subscription(status, code, request_id=request_id)
                raise Refusal(problem, "payment" if code == 402 else "forbidden", status.value)
        return on_route

    @staticmethod
    def _head(
        route: RouteRuntime,
        source: Any,
        request: Request,
        request_id: str,
        plan: str,
        subscription: str,
    ) -> RequestHead:
        try:
            return route.rules(source).head(request, request_id.encode(), plan, subscription)
        except (BadRequest, PayloadTooLarge) as error:
            problem = client_problem(error, route.route.rules.max_body, request_id=request_id)
            raise Refusal(problem, "bad_request", error.code) from None

    def _ask_upstream(self, route: RouteRuntime, request_id: str) -> None:
        """Whether its upstream takes requests now: one that would go nowhere is not counted."""
        pool = route.pool
        try:
            if pool.refusing is not None:
                pool.refusing()
        except ProxyError as error:
            self._metrics.upstream_errors.inc(pool.upstream.name, error.code)
            problem = upstream_problem(error, pool.upstream, request_id=request_id)
            raise Refusal(problem, "upstream_error", f"{error.code}: {error}") from None

    @staticmethod
    def _limited(
        decision: Decision, limit_headers: list[tuple[bytes, bytes]], own_id: str, request_id: str
    ) -> Refusal:
        decision_id = decision_id_of(own_id)
        problem = problems.quota_exceeded(
            decision.states,
            request_id=request_id,
            decision_id=decision_id,
            limit_headers=limit_headers,
        )
        names = ",".join(state.name for state in decision.states if not state.allowed)
        return Refusal(problem, "limited", names, decision_id)

    def _repeat(
        self,
        refused: Refused,
        on_route: PlanOnRoute,
        route: RouteRuntime,
        exchange: Exchange,
        subject: str,
        request_id: str,
        own_id: str,
    ) -> None:
        """Refuse once more, without asking: nothing is looked at that only an upstream needs."""
        now = clock.monotonic()
        answer = refused.rendered
        if now >= refused.rendered_until or not isinstance(answer, RepeatedRefusal):
            states = self._limiter.repeat(on_route.admission, refused).states
            answer = refused.rendered = RepeatedRefusal(states, on_route.headers.of(states))
            refused.rendered_until = now + holds_s(states)
        else:
            self._limiter.repeated(answer.reasons)
        decision_id = decision_id_of(own_id)
        logs.rejection(
            429,
            answer.names,
            subject,
            route.route.name,
            on_route.plan.name,
            request_id,
            decision_id,
        )
        headers = [*answer.headers, (b"x-request-id", request_id.encode())]
        if route.cors is not None:
            headers += route.cors.fields(exchange.request)
        exchange.respond(429, headers, answer.body(request_id, decision_id))

    def _relayed(
        self, result: RelayResult, route: RouteRuntime, decision: Decision, request_id: str
    ) -> str:
        upstream = route.route.upstream
        self._upstream_seconds[upstream].observe(result.head_ms / 1000)
        if result.outcome is Outcome.COMPLETE:
            return "overage" if decision.overage else "admitted"
        if result.outcome is Outcome.CLIENT_GONE:
            return "client_gone"
        if isinstance(result.error, BadRequest | RequestTimeout | PayloadTooLarge):
            return "bad_request"  # its body went wrong after the answer had begun
        code = result.error.code if result.error else "broken"
        self._metrics.upstream_errors.inc(upstream, code)
        logs.get_logger().warning(
            "upstream_answer_broken",
            request_id=request_id,
            route=route.route.name,
            upstream=upstream,
            code=code,
            reason=str(result.error),
        )
        return "upstream_error"

    def _refuse(
        self,
        refusal: Refusal,
        exchange: Exchange,
        subject: str,
        matched: RouteRuntime | None,
        plan: str,
        request_id: str,
        own_id: str,
    ) -> None:
        problem, decision_id = refusal.problem, refusal.decision_id
        if not decision_id:
            decision_id = decision_id_of(own_id)
            problem = problems.with_decision(problem, decision_id)
        status, reason = problem.status, refusal.reason
        route = matched.route.name if matched is not None else ""
        logs.rejection(status, reason, subject, route, plan, request_id, decision_id)
        self._answer(problem, exchange, request_id, _cors(matched, exchange.request))

    @staticmethod
    def _answer(
        problem: Problem, exchange: Exchange, request_id: str, more: Sequence[Header] = ()
    ) -> None:
        headers = [*problem.headers, *more, (b"x-request-id", request_id.encode())]
        if not any(name == b"server" for name, _ in problem.headers):
            headers.append(SERVER)
        exchange.respond(problem.status, headers, problem.body)


def _cors(matched: RouteRuntime | None, request: Request) -> Sequence[Header]:
    """What lets a page read why it was refused."""
    if matched is None or matched.cors is None:
        return ()
    return matched.cors.fields(request)


def _costs(decision: Decision | None) -> dict[str, list[dict[str, str]]]:
    """What the answer decided of the cost, for the access log."""
    if decision is None or decision.charge is None or not decision.charge.costs:
        return {}
    return {"costs": [described(cost) for cost in decision.charge.costs]}
