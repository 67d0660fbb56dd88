"""One request through the responder, with everything behind it played: answers and outcomes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from core.config import loads
from gateway import responder as module
from gateway.admission.limiter import Decision
from gateway.http.errors import BadRequest, ClientDisconnected, ExchangeError, RequestTimeout
from gateway.http.message import Request
from gateway.proxy.errors import (
    BadUpstreamResponse,
    ConnectError,
    PoolExhausted,
    ResponseTimeout,
)
from gateway.proxy.relay import Outcome, RelayResult
from gateway.responder import Responder
from gateway.runtime import Runtime
from tests.support.exchange import RecordingExchange

CONFIG = """
upstreams: {api: {urls: [http://127.0.0.1:9000]}}
routes:
  - {match: {path: /public/*}, upstream: api, keyless: true, plan: anonymous, name: public}
plans: {anonymous: {limits: {slots: {concurrency: 5}}}}
"""
LEASE = object()


class Played:
    """Records what the responder does, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.subjects: list[str] = []
        self.in_flight = 0
        self.admission = self
        self.upstream_errors = self

    # LocalMetrics

    def upstream(self, name: str) -> Played:
        return self

    def observe(self, value: float) -> None: ...

    def inc(self, *labels: str) -> None:
        self.log.append(("upstream_error", *labels))

    def record(self, *labels: str) -> None:
        self.log.append(("record", *labels))

    # Limiter

    async def admit_anonymous(self, admission: object, subject: str, request: str) -> Decision:
        self.subjects.append(subject)
        return Decision(True, False, [], LEASE)  # type: ignore[arg-type]

    def release(self, decision: Decision) -> None:
        assert decision.held is LEASE
        self.log.append("released")


def ask(
    monkeypatch: pytest.MonkeyPatch,
    result: ExchangeError | RelayResult,
    path: str = "/public/x",
    client: str = "192.0.2.1",
    headers: list[tuple[bytes, bytes]] | None = None,
) -> tuple[Played, RecordingExchange]:
    async def relay(*args: object, **more: object) -> RelayResult:
        if isinstance(result, ExchangeError):
            raise result
        return result

    monkeypatch.setattr(module, "relay", relay)
    played = Played()
    request = Request("GET", path.encode(), [(b"host", b"h"), *(headers or [])], peer=client)
    exchange = RecordingExchange(request)

    async def main() -> None:
        runtime = Runtime(loads(CONFIG, env={}), {})
        parts: Any = played
        no = SimpleNamespace()
        answer = Responder(runtime, no, parts, parts, no)  # type: ignore[arg-type]
        await answer(exchange)

    asyncio.run(main())
    assert played.in_flight == 0
    assert exchange.ended
    return played, exchange


@pytest.mark.parametrize(
    ("error", "status", "slug", "outcome"),
    [
        (BadRequest("odd"), 400, "bad-request", "bad_request"),
        (RequestTimeout("slow"), 408, "request-timeout", "bad_request"),
        (ConnectError("refused"), 502, "bad-gateway", "upstream_error"),
        (BadUpstreamResponse("odd"), 502, "bad-gateway", "upstream_error"),
        (PoolExhausted("full"), 503, "upstream-busy", "upstream_error"),
        (ResponseTimeout("slow"), 504, "gateway-timeout", "upstream_error"),
    ],
)
def test_what_goes_wrong_on_the_way_has_its_answer_and_its_outcome(
    monkeypatch: pytest.MonkeyPatch, error: ExchangeError, status: int, slug: str, outcome: str
) -> None:
    played, exchange = ask(monkeypatch, error)
    ((answered, headers, body),) = exchange.answers
    assert answered == status
    assert (b"server", b"tallygate") in headers
    assert orjson.loads(body)["type"] == f"urn:tallygate:problem:{slug}"
    upstream = [entry for entry in played.log if entry[0] == "upstream_error"]
    assert bool(upstream) == (outcome == "upstream_error"), "whose fault it was"
    # The slot is free before anything else is done.
    rest = [entry for entry in played.log if entry not in upstream]
    assert rest == ["released", ("record", "public", "anonymous", outcome)]


@pytest.mark.parametrize(
    ("outcome", "error", "recorded"),
    [
        (Outcome.COMPLETE, None, "admitted"),
        (Outcome.CLIENT_GONE, ClientDisconnected("gone"), "client_gone"),
        (Outcome.BROKEN, RequestTimeout("slow"), "bad_request"),
        (Outcome.BROKEN, ResponseTimeout("slow"), "upstream_error"),
    ],
)
def test_how_a_started_answer_ended(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, error: ExchangeError | None, recorded: str
) -> None:
    played, exchange = ask(monkeypatch, RelayResult(200, 0, 0, 1.0, outcome, error))
    assert exchange.answers == []
    assert played.log[-2:] == ["released", ("record", "public", "anonymous", recorded)]
    assert (("upstream_error", "api", "upstream-timeout") in played.log) == (
        recorded == "upstream_error"
    )


def test_a_request_that_cannot_be_forwarded_is_no_error_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = ConnectError("not reached")
    twice = [(b"content-length", b"1"), (b"content-length", b"2")]
    played, exchange = ask(monkeypatch, never, headers=twice)
    assert exchange.answers[0][0] == 400
    assert played.log == [("record", "public", "anonymous", "bad_request")]
    played, exchange = ask(monkeypatch, never, path="/public/../x")
    assert exchange.answers[0][0] == 400
    assert played.log == [("record", "", "", "bad_request")]


@pytest.mark.parametrize(
    ("client", "subject"),
    [
        ("192.0.2.1", "ip:anonymous:192.0.2.1"),
        ("::ffff:192.0.2.1", "ip:anonymous:192.0.2.1"),
        ("2001:db8::1", "ip:anonymous:2001:db8::/64"),
    ],
)
def test_without_a_key_the_client_s_network_is_counted(
    monkeypatch: pytest.MonkeyPatch, client: str, subject: str
) -> None:
    done = RelayResult(200, 0, 0, 1.0, Outcome.COMPLETE)
    played, _ = ask(monkeypatch, done, client=client)
    assert played.subjects == [subject]
