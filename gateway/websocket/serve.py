"""One WebSocket: from an admitted handshake to the line in the log that says why it ended.

The handshake is a request like any other: authenticated, admitted, charged. While the connection
lives, its key, plan and limits are looked at again from time to time, so a key that was revoked or
a plan that was changed does not live on in a socket that stays open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from core import clock
from core.errors import StoreUnavailableError
from core.policy import WebSocket
from core.telemetry import logs
from core.telemetry.local import LocalMetrics
from gateway.admission.limiter import Decision, Limiter
from gateway.answers import problems
from gateway.answers.problems import Problem
from gateway.auth import Authenticator
from gateway.auth import Outcome as Auth
from gateway.auth.keycache import Subscription
from gateway.http.errors import ClientDisconnected
from gateway.http.exchange import Exchange
from gateway.http.h1 import Http1Exchange
from gateway.http.message import Header, Request
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.relay import RelayResult, relay
from gateway.proxy.request import RequestHead
from gateway.proxy.websocket import handshake
from gateway.proxy.websocket.frames import POLICY, TRY_AGAIN, FrameReader
from gateway.proxy.websocket.handshake import Handshake, HandshakeError
from gateway.proxy.websocket.side import Admit, Refusal, Side
from gateway.proxy.websocket.tunnel import GATEWAY, Tunnel
from gateway.runtime import PlanOnRoute, RouteRuntime, Runtime
from gateway.websocket.metering import Metering

_log = logs.get_logger()

_SERVICE_RESTART: Final = 1012  # IANA: connect again
# A worker that is full will not be for long: its connections end.
_FULL_RETRY_S: Final = 5
_PAID: Final = 200  # an opened WebSocket is paid for as a success would be


class WebSockets:
    """What a worker knows of its WebSockets; `current()` is the runtime in force."""

    def __init__(
        self,
        limiter: Limiter,
        authenticator: Authenticator,
        metrics: LocalMetrics,
        current: Callable[[], Runtime],
    ) -> None:
        self.limiter = limiter
        self.authenticator = authenticator
        self.metrics = metrics
        self.current = current

    def asked(self, route: RouteRuntime, request: Request) -> Handshake | None:
        """The handshake that a request is; None when it is to be answered as any other.

        Raises:
            HandshakeError: it cannot be served.
        """
        rule = route.route.websocket
        assert rule is not None
        shake = handshake.read(request, rule)
        if shake is not None:
            open_now = self.metrics.websockets[route.route.name]
            if open_now >= rule.max_connections:
                raise HandshakeError(503, "websockets-busy", "Too many WebSockets are open.")
        return shake

    async def relay(
        self,
        exchange: Exchange,
        shake: Handshake,
        *,
        route: RouteRuntime,
        on_route: PlanOnRoute,
        head: RequestHead,
        decision: Decision,
        subject: Subscription | str,
        own_id: str,
        limit_headers: Sequence[Header],
    ) -> RelayResult:
        """As `relay` does, and to the end of the WebSocket where one was opened.

        `subject` is the subscription, or on a keyless route its own subject.
        """
        live = _Live(self, exchange, shake, route, on_route, subject, own_id)
        charge = decision.charge
        extra = [*limit_headers]

        async def switch(conn: UpstreamConnection) -> None:
            compressed = handshake.agreed(conn.headers, shake)
            headers = [pair for pair in conn.headers if pair[0] not in route.drop_response_headers]
            if route.default_server is not None and not conn.names_server:
                headers.append(route.default_server)
            answer = handshake.answer([*headers, *extra])
            transport, rest = conn.detach()
            try:
                # Nothing can go wrong with the upstream's answer any more: it is paid for.
                if charge is not None:
                    await charge.answered(_PAID)
                live.open(transport, rest, answer, compressed)
            except BaseException:
                transport.abort()
                raise

        result = await relay(
            exchange,
            pool=route.pool,
            head=handshake.requested(head, shake),
            extra_response_headers=limit_headers,
            drop_response_headers=route.drop_response_headers,
            default_server=route.default_server,
            before_start=charge.answered if charge is not None else None,
            switch=switch,
        )
        if live.tunnel is not None:
            await live.run(live.tunnel, head.request_id.decode("latin-1"))
        return result


class _Live:
    """One WebSocket while it is open."""

    def __init__(
        self,
        sockets: WebSockets,
        exchange: Exchange,
        shake: Handshake,
        route: RouteRuntime,
        on_route: PlanOnRoute,
        subject: Subscription | str,
        own_id: str,
    ) -> None:
        self._sockets = sockets
        self._exchange = exchange
        self._shake = shake
        self._route = route.route.name
        self._rule: WebSocket = route.route.websocket or WebSocket()
        self._plan = on_route.plan.name
        self._metering: Metering | None = on_route.metering
        self._subject = subject
        self._own_id = own_id
        self.tunnel: Tunnel | None = None

    def open(
        self, transport: asyncio.Transport, rest: bytes, answer: bytes, compressed: bool
    ) -> None:
        """Both sockets go on as a tunnel; `answer` is what the client is sent first.

        `transport` is the upstream's, of which `rest` was read already.
        """
        exchange, rule = self._exchange, self._rule
        assert isinstance(exchange, Http1Exchange)
        if exchange.gone:
            raise ClientDisconnected("the client closed the connection")
        sides = [
            Side(
                name,
                FrameReader(
                    masked=name == "client", compressed=compressed, max_message=rule.max_message
                ),
                self._admit(name),
            )
            for name in ("client", "upstream")
        ]
        client, upstream = sides
        self.tunnel = Tunnel(client, upstream, idle_ms=rule.idle_ms, on_passed=self._passed)
        upstream.attach(transport)
        exchange.take_over(client, answer)
        upstream.start(rest)

    async def run(self, tunnel: Tunnel, request_id: str) -> None:
        """To the end of the WebSocket; whatever happens, both connections are closed then."""
        metrics, route = self._sockets.metrics, self._route
        started = clock.monotonic()
        metrics.in_flight -= 1  # from here on it is no request that is being served
        metrics.websockets[route] += 1
        try:
            while not tunnel.closed.done():
                await asyncio.wait((tunnel.closed,), timeout=self._rule.recheck_ms / 1000)
                if not tunnel.closed.done():
                    await self._recheck(tunnel)
        finally:
            tunnel.abort()
            metrics.in_flight += 1
            metrics.websockets[route] -= 1
            metrics.websocket_closed.inc(route, tunnel.who, _code_label(tunnel.code))
            _log.info(
                "websocket_closed",
                request_id=request_id,
                route=route,
                subject=self._subject_id,
                plan=self._plan,
                seconds=round(clock.monotonic() - started, 3),
                messages_in=tunnel.client.messages,
                messages_out=tunnel.upstream.messages,
                bytes_in=tunnel.client.payload,
                bytes_out=tunnel.upstream.payload,
                code=tunnel.code,
                who=tunnel.who,
                reason=tunnel.reason,
            )

    @property
    def _subject_id(self) -> str:
        return self._subject if isinstance(self._subject, str) else self._subject.id

    def _passed(self, client: bool, messages: int, payload: int) -> None:
        labels = (self._route, "in" if client else "out")
        metrics = self._sockets.metrics
        if messages:
            metrics.websocket_messages.pending[labels] += messages
        metrics.websocket_bytes.pending[labels] += payload

    # What it costs

    def _admit(self, sender: str) -> Admit | None:
        if self._metering is None or not self._metering.counts(sender):
            return None

        async def admit(messages: int, payload: int) -> Refusal | None:
            return await self._ask(sender, messages, payload)

        return admit

    async def _ask(self, sender: str, messages: int, payload: int) -> Refusal | None:
        metering = self._metering
        admission = metering.admission(sender, messages, payload) if metering is not None else None
        if admission is None:
            return None
        limiter, subject = self._sockets.limiter, self._subject
        try:
            if isinstance(subject, str):
                decision = await limiter.admit_anonymous(admission, subject, self._own_id)
            else:
                decision = await limiter.admit(admission, subject, self._own_id)
        except StoreUnavailableError as error:
            _log.warning("websocket_undecided", subject=self._subject_id, reason=str(error))
            return Refusal(TRY_AGAIN, "usage cannot be counted at the moment; connect again soon")
        limiter.release(decision)
        if decision.admitted:
            return None
        names = ", ".join(state.name for state in decision.states if not state.allowed)
        return Refusal(POLICY, f"limit reached: {names}")

    # What may have changed

    async def _recheck(self, tunnel: Tunnel) -> None:
        refusal = await self._still_welcome()
        if refusal is not None:
            tunnel.shut(*refusal, who=GATEWAY)

    async def _still_welcome(self) -> Refusal | None:
        route = self._sockets.current().routes.get(self._route)
        if route is None or route.route.websocket is None:
            return Refusal(_SERVICE_RESTART, "the route was changed; connect again")
        if isinstance(self._subject, Subscription):
            request = self._exchange.request
            authenticate = self._sockets.authenticator.authenticate_slow
            outcome, entry, _ = await authenticate(request.headers, request.query)
            if outcome is Auth.UNAVAILABLE:
                return None  # known to be good before; what is new is learnt when Postgres is back
            if outcome is not Auth.OK or entry is None:
                return Refusal(POLICY, "the key is not valid any more")
            if entry.subscription.plan != self._plan:
                return Refusal(_SERVICE_RESTART, "the plan was changed; connect again")
            self._subject = entry.subscription
        on_route = route.plans.get(self._plan)
        if on_route is None:
            return Refusal(POLICY, "the plan is not in force any more")
        if isinstance(self._subject, Subscription):
            status = self._subject.status
            if on_route.plan.status_rule[status] is not None:
                return Refusal(POLICY, f"the subscription is {status}")
        if not _same_senders(self._metering, on_route.metering):
            return Refusal(_SERVICE_RESTART, "the route was changed; connect again")
        self._metering = on_route.metering
        return None


def problem(error: HandshakeError, request_id: str) -> Problem:
    """The answer to a handshake that cannot be served."""
    if error.status == 426:
        return problems.upgrade_required(str(error), request_id=request_id)
    if error.status == 403:
        return problems.forbidden(error.code, str(error), request_id=request_id)
    if error.status == 503:
        return problems.upstream_busy(_FULL_RETRY_S, request_id=request_id)
    return problems.bad_request(str(error), request_id=request_id)


def _same_senders(before: Metering | None, now: Metering | None) -> bool:
    """Whether the same ends are counted: which is fixed when a tunnel is made."""
    return [m is not None and m.counts(s) for m in (before,) for s in ("client", "upstream")] == [
        m is not None and m.counts(s) for m in (now,) for s in ("client", "upstream")
    ]


def _code_label(code: int) -> str:
    """Of a close code, which a client chooses, what may name a time series."""
    if 1000 <= code <= 1015:
        return str(code)
    return f"{code // 1000}xxx" if 3000 <= code < 5000 else "other"
