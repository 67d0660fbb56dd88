"""The answer decides the cost: whatever becomes of it, the books say what the route says."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from core.keyspace import Keyspace
from tests.acceptance.conftest import NewDatabase
from tests.acceptance.test_memory import children
from tests.acceptance.test_outage import away, empty
from tests.support import wait_until
from tests.support.processes import run_module
from tests.support.scripted import SSE_HEAD, Answering, ScriptedUpstream, Wire, ask
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber, start_stack

DEADLINE_S = 30
ESTIMATE = 1_000
MICRO = Decimal(10**6)

_CONFIG = """
gateway:
  drain: 2s
  reservation: 2s
  access_log: true
  outage: {spool_dir: "%(spool)s"}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 1s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms, lease: 1s}
log: {format: json, level: info}
upstreams: {llm: {urls: ["%(upstream)s"]}, away: {urls: ["http://127.0.0.1:1"]}}
meters: {tokens: {unit: token}, money: {decimals: 6}, ms: {unit: ms}}
routes:
  - match: {path: /header}
    upstream: llm
    meters: {requests: 1, money: {estimate: 0.5, from: {header: X-Usage-Cost}, max: 2}}
  - match: {path: /json}
    upstream: llm
    meters: {requests: 1, tokens: {estimate: 1_000, from: {json: usage.total, limit: 64KiB}}}
  - match: {path: /bytes}
    upstream: llm
    meters:
      requests: 1
      tokens: {estimate: 1_000, from: {bytes: response, per: 10}, on_abort: streamed}
  - match: {path: /time}
    upstream: llm
    meters: {requests: 1, ms: {estimate: 1_000, from: {duration: response}}}
  - match: {path: /streamed}
    upstream: llm
    meters: &streamed
      requests: 1
      tokens:
        estimate: 1_000
        from: {sse: usage.total, json: usage.total, per_event: 3}
        on_abort: streamed
  - match: {path: /estimate}
    upstream: llm
    meters: &estimate {requests: 1, tokens: {estimate: 1_000, from: {sse: usage.total}}}
  - match: {path: /nothing}
    upstream: llm
    meters: {requests: 1, tokens: {estimate: 1_000, from: {sse: usage.total}, on_abort: nothing}}
  - {match: {path: /paid}, upstream: llm, charge: {status: [2xx]}, meters: *streamed}
  - {match: {path: /answered}, upstream: llm, charge: on_response, meters: *estimate}
  - {match: {path: /open}, upstream: llm, outage: open, meters: *streamed}
  - {match: {path: /away}, upstream: away, meters: *estimate}
  - {match: {path: /away/streamed}, upstream: away, meters: *streamed}
  - {match: {path: /away/paid}, upstream: away, charge: on_response, meters: *estimate}
plans:
  large: {unlimited: true}
  small:
    limits:
      monthly: {period: billing, limit: 2_000, meter: tokens, thresholds: [50, 100]}
      daily: {period: day, limit: 1_000_000, meter: tokens, thresholds: [1]}
"""


@dataclass
class Place:
    stack: Stack
    upstream: ScriptedUpstream
    spool: Path

    def open(self, path: str, who: Subscriber, *headers: str) -> tuple[Wire, Answering]:
        """A request, as far as the upstream."""
        client = ask(self.stack.ports[0], path, who.key, *headers)
        return client, self.upstream.take()

    def stream(self, path: str, who: Subscriber, *events: str) -> tuple[Wire, Answering]:
        """An answer in events, of which the client has the first ones."""
        client, answer = self.open(path, who)
        answer.send(SSE_HEAD)
        for event in events:
            answer.event(event)
        client.until(f"data: {events[-1]}\n\n".encode() if events else b"\r\n\r\n")
        return client, answer


def config(upstream: ScriptedUpstream, spool: Path) -> str:
    return _CONFIG % {"upstream": upstream.url, "spool": spool}


@pytest.fixture(scope="module")
def place(new_database: NewDatabase) -> Iterator[Place]:
    """A stack of one worker, which tests leave as they found it."""
    with server_directory() as path, ScriptedUpstream() as upstream:
        spool = path / "spool"
        text = config(upstream, spool)
        with start_stack(path, text, new_database()) as stack:
            yield Place(stack, upstream, spool)


def books(stack: Stack, who: Subscriber) -> dict[str, dict[str, Decimal]]:
    """The totals of each meter: live, and in the ledger as a period and as hours."""
    live = {name: use.total for name, use in stack.state(who).items()}
    if "money" in live:
        live["money"] /= MICRO
    return {
        "live": live,
        "period": {name: use.total for name, use in stack.ledger(who).items()},
        "hours": {name: use.total for name, use in stack.ledger_hours(who).items()},
    }


def booked(stack: Stack, who: Subscriber, **totals: int | Decimal) -> None:
    """Waits until nothing is reserved any more and all books have these totals."""
    due = Keyspace().due(0)
    expected = {name: Decimal(total) for name, total in totals.items()}

    def everywhere() -> bool:
        if any(name.startswith(b"v:") for name in stack.hash(who)):
            return False
        return all(
            {name: found.get(name, Decimal(0)) for name in expected} == expected
            for found in books(stack, who).values()
        )

    try:
        wait_until(everywhere, DEADLINE_S)
    except AssertionError:
        left = stack.redis.zrange(due, 0, -1)
        raise AssertionError(f"not {expected}: {books(stack, who)}, {left}") from None


def usage(total: object) -> str:
    return f'{{"usage": {{"total": {total}}}}}'


@pytest.mark.parametrize(
    ("sent", "money"),
    [
        ((b"X-Usage-Cost: 0.000123",), "0.000123"),
        ((b"x-usage-cost: 2",), "2"),
        ((b"x-usage-cost: 0",), "0"),
        ((), "0.5"),
        ((b"x-usage-cost: -1",), "0.5"),
        ((b"x-usage-cost: NaN",), "0.5"),
        ((b"x-usage-cost: 2.000001",), "0.5"),
    ],
)
def test_a_header_and_what_cannot_be_believed(
    place: Place, sent: tuple[bytes, ...], money: str
) -> None:
    who = place.stack.subscribe("large")
    client, answer = place.open("/header", who)
    answer.respond(b"body", b"x-kept: 1", *sent)
    received = client.until(b"body").lower()
    assert b"x-kept: 1" in received
    assert b"x-usage-cost" not in received
    booked(place.stack, who, requests=1, money=Decimal(money))


def test_a_json_body(place: Place) -> None:
    stack = place.stack
    for body, tokens in (
        (usage(4_321).encode(), 4_321),
        (b" " * 70_000 + usage(4_321).encode(), ESTIMATE),
        (b"<html>", ESTIMATE),
    ):
        who = stack.subscribe("large")
        client, answer = place.open("/json", who, "accept-encoding: gzip, br")
        assert b"accept-encoding: identity\r\n" in answer.received
        assert b"gzip" not in answer.received
        answer.respond(body, b"content-type: application/json")
        client.until(body)
        booked(stack, who, requests=1, tokens=tokens)


def test_bytes_and_time(place: Place) -> None:
    stack = place.stack
    who, timed = stack.subscribe("large"), stack.subscribe("large")
    client, answer = place.open("/bytes", who)
    answer.respond(b"x" * 100_001)
    client.until(b"x" * 100_001)
    booked(stack, who, requests=1, tokens=10_001)

    began = time.monotonic()
    client, answer = place.open("/time", timed)
    held = time.monotonic()
    answer.send(SSE_HEAD)
    wait_until(lambda: time.monotonic() > held + 0.05)
    answer.chunk(b"")
    client.until(b"0\r\n\r\n")
    wait_until(lambda: stack.state(timed)["ms"].total != ESTIMATE, DEADLINE_S, "it is settled")
    longest = (time.monotonic() - began) * 1000 + 1
    ms = stack.state(timed)["ms"].total
    assert 50 <= ms <= longest
    booked(stack, timed, requests=1, ms=ms)


def test_events_at_the_end_of_a_stream(place: Place) -> None:
    stack = place.stack
    who = stack.subscribe("large")
    client, answer = place.stream("/streamed", who, "{}", '{"usage": null}')
    assert stack.state(who)["tokens"].total == ESTIMATE
    answer.event(usage(77))
    answer.event("[DONE]")
    answer.chunk(b"")
    client.until(b"0\r\n\r\n")
    booked(stack, who, requests=1, tokens=77)
    # the same route answers with a document when it is not asked for a stream
    client, answer = place.open("/streamed", who)
    answer.respond(usage(3).encode(), b"content-type: application/json")
    client.until(b"}}")
    booked(stack, who, requests=2, tokens=80)


@pytest.mark.parametrize("left", ["client", "upstream"])
def test_an_answer_that_is_cut_costs_what_the_route_says(place: Place, left: str) -> None:
    stack = place.stack
    expected = {"/streamed": 20 + 6, "/paid": 26, "/estimate": ESTIMATE, "/nothing": 0}
    for path, tokens in expected.items():
        who = stack.subscribe("large")
        client, answer = place.stream(path, who, "{}", usage(20), "{}", "{}")
        (client if left == "client" else answer).close()
        if left == "upstream":
            assert not client.to_the_end().endswith(b"0\r\n\r\n")
        booked(stack, who, requests=1, tokens=tokens)


def test_a_client_that_leaves_with_the_last_event_pays_the_total(place: Place) -> None:
    who = place.stack.subscribe("large")
    client, _ = place.stream("/nothing", who, usage(20), "[DONE]")
    client.close()
    booked(place.stack, who, requests=1, tokens=20)


def test_without_an_answer(place: Place) -> None:
    stack = place.stack
    for path, requests, tokens in (
        ("/away", 1, ESTIMATE),
        ("/away/streamed", 1, 0),
        ("/away/paid", 0, 0),
    ):
        who = stack.subscribe("large")
        assert stack.get(path, who.key).status_code == 502
        booked(stack, who, requests=requests, tokens=tokens)
    who = stack.subscribe("large")
    client, answer = place.open("/paid", who)
    answer.respond(usage(5).encode(), status=b"500 Broken")
    client.until(b"}}")
    booked(stack, who, requests=0, tokens=0)
    client, _ = place.open("/answered", who)
    client.close()
    booked(stack, who, requests=0, tokens=0)


def test_a_correction_passes_a_quota_and_its_thresholds_fire_once(place: Place) -> None:
    stack = place.stack
    who = stack.subscribe("small")
    client, answer = place.stream("/streamed", who, usage(12_000))
    answer.chunk(b"")
    client.until(b"0\r\n\r\n")
    booked(stack, who, requests=1, tokens=12_000)
    assert [stack.get("/streamed", who.key).status_code for _ in range(3)] == [429] * 3
    stack.quiet()
    assert sorted(stack.events(who)) == [
        ("daily", "warning", 1),
        ("monthly", "critical", 100),
        ("monthly", "exceeded", 100),
        ("monthly", "warning", 50),
    ]


def test_the_log_says_why_a_request_was_charged_what_it_was(place: Place) -> None:
    stack = place.stack
    who = stack.subscribe("large")
    client, answer = place.open("/streamed", who, "x-request-id: asked-about")
    answer.respond(usage(1_234).encode(), b"content-type: application/json")
    client.until(b"}}")
    output = stack.gateways[0].wait_for_output("asked-about")
    (line,) = [
        json.loads(text) for text in output.splitlines() if '"request_id":"asked-about"' in text
    ]
    assert (line["event"], line["subject"]) == ("request", who.id)
    assert line["costs"] == [
        {
            "meter": "tokens",
            "estimate": "1000",
            "charged": "1234",
            "source": "json_or_sse",
            "result": "actual",
        }
    ]
    # an estimate that stands, and why: only this request sends a negative number in a body
    client, answer = place.open("/json", who)
    answer.respond(usage(-5).encode())
    client.until(b"}}")
    booked(stack, who, requests=2, tokens=1_234 + ESTIMATE)
    labels = {"meter": "tokens", "source": "json", "result": "kept_negative"}
    wait_until(
        lambda: stack.metric("tallygate_costs_settled_total", **labels) == 1, what="the metric"
    )
    warnings = [
        json.loads(text)
        for text in stack.gateways[0].output.splitlines()
        if '"event":"cost_estimate_kept"' in text and "kept_negative" in text
    ]
    assert who.id in [warning["subject"] for warning in warnings]


def kept(stack: Stack, who: Subscriber) -> list[str]:
    """What the reservations of a subscriber say is charged for tokens, should they expire."""
    words = [text.decode().split() for name, text in stack.hash(who).items() if name[:2] == b"v:"]
    return [text[text.index("tokens") + 1] for text in words]


def test_a_killed_worker_leaves_what_the_route_says(place: Place) -> None:
    """Of what it streamed, what it had told: at most the last second is lost."""
    stack = place.stack
    rules = {
        "/streamed": (1, 9),
        "/paid": (1, 9),
        "/bytes": (1, 3),
        "/estimate": (1, ESTIMATE),
        "/answered": (1, ESTIMATE),
        "/nothing": (1, 0),
    }
    # not answered when it is killed
    silent = {"/streamed": (1, 0), "/estimate": (1, ESTIMATE), "/paid": (0, 0), "/answered": (0, 0)}
    with ExitStack() as stop:
        streaming, waiting = {}, {}
        for path in rules:
            who = streaming[path] = stack.subscribe("large")
            for wire in place.stream(path, who, "{}", "{}", "{}"):
                stop.enter_context(wire)
        for path in silent:
            who = waiting[path] = stack.subscribe("large")
            for wire in place.open(path, who):
                stop.enter_context(wire)
        for path, told in (("/streamed", "9"), ("/paid", "9"), ("/bytes", "3")):
            wait_until(
                lambda path=path, told=told: kept(stack, streaming[path]) == [f"{ESTIMATE}/{told}"],
                DEADLINE_S,
                f"{path} has told how far it has come",
            )
        (worker,) = children(stack.gateways[0].pid)
        os.kill(worker, signal.SIGKILL)
        for path, (requests, tokens) in rules.items():
            booked(stack, streaming[path], requests=requests, tokens=tokens)
        for path, (requests, tokens) in silent.items():
            booked(stack, waiting[path], requests=requests, tokens=tokens)
    wait_until(lambda: stack.get("/-/readyz").status_code == 200, DEADLINE_S, "another worker")


def test_a_stream_beyond_its_estimate_is_counted_as_it_goes(place: Place) -> None:
    stack = place.stack
    who = stack.subscribe("large")
    client, answer = place.stream("/streamed", who, usage(5_000))
    wait_until(lambda: stack.state(who)["tokens"].total == 5_000, DEADLINE_S, "it is counted")
    answer.event(usage(6_000))
    answer.chunk(b"")
    client.until(b"0\r\n\r\n")
    booked(stack, who, requests=1, tokens=6_000)


@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_an_outage_charges_the_corrected_cost_once(place: Place, how: str) -> None:
    """Admitted without Redis, or admitted before and answered or ended while it was away."""
    stack = place.stack
    names = ("before", "during", "across", "cut", "late")
    who = {name: stack.subscribe("large") for name in names}
    wait_until(lambda: stack.get("/-/readyz").status_code == 200, DEADLINE_S, "ready")
    for subscriber in who.values():  # its key is known from here on
        client, answer = place.open("/streamed", subscriber)
        answer.respond(usage(1).encode())
        client.until(b"}}")
        booked(stack, subscriber, requests=1, tokens=1)
    ended = place.stream("/streamed", who["before"], "{}")
    late = place.open("/paid", who["late"])
    with away(stack, how):
        across = place.stream("/open", who["across"], "{}")
        during = place.stream("/open", who["during"], usage(7))
        cut = place.stream("/open", who["cut"], usage(7), "{}")
        late[1].send(SSE_HEAD)
        for client, answer in (ended, during, late):
            answer.event(usage(40))
            answer.chunk(b"")
            client.until(usage(40).encode() + b"\n\n")
        cut[0].close()
        wait_until(lambda: not empty(place.spool), DEADLINE_S, "it is written down")
    for answer in (cut[1],):
        answer.close()
    across[1].event(usage(2_000))
    across[1].chunk(b"")
    across[0].until(b"0\r\n\r\n")
    wait_until(lambda: empty(place.spool), DEADLINE_S, "the spool is replayed")
    for name, tokens in {
        "before": 40,
        "during": 40,
        "cut": 10,
        "late": 40,
        "across": 2_000,
    }.items():
        booked(stack, who[name], requests=2, tokens=tokens + 1)


def test_a_worker_killed_in_an_outage_leaves_the_estimate(
    new_database: NewDatabase, own_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    with ScriptedUpstream() as upstream:
        stack = own_stack(config(upstream, tmp_path))
        place = Place(stack, upstream, tmp_path)
        who = stack.subscribe("large")
        client, answer = place.open("/open", who)
        answer.respond(usage(1).encode())
        client.until(b"}}")
        with away(stack, "killed"):
            wires = place.stream("/open", who, usage(7))
            (worker,) = children(stack.gateways[0].pid)
            os.kill(worker, signal.SIGKILL)
            for wire in wires:
                wire.close()
        booked(stack, who, requests=2, tokens=1 + ESTIMATE)


def test_a_gateway_that_is_stopped_settles_what_it_cuts(
    own_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    """Nothing waits for an expiry: the drain is over, the answer cut, and what came is charged."""
    with ScriptedUpstream() as upstream:
        text = config(upstream, tmp_path).replace("reservation: 2s", "reservation: 1h")
        stack = own_stack(text.replace("drain: 2s", "drain: 100ms"))
        place = Place(stack, upstream, tmp_path)
        who = stack.subscribe("large")
        client, answer = place.stream("/streamed", who, usage(5), "{}", "{}")
        with client, answer:
            os.kill(stack.gateways[0].pid, signal.SIGTERM)
            assert not client.to_the_end().endswith(b"0\r\n\r\n")
            booked(stack, who, requests=1, tokens=11)


def test_the_books_agree(place: Place) -> None:
    """After all of the above: nothing is open, and the audit finds no difference."""
    stack = place.stack
    stack.quiet()
    keyspace = Keyspace()
    open_ = [key for key in stack.redis.scan_iter(keyspace.states()) if _reserved(stack, key)]
    assert open_ == []
    with run_module(
        "cli.main", "audit", "--config", str(stack.config), "--json", env=stack.env
    ) as process:
        assert process.popen.wait(DEADLINE_S) == 0, process.output


def _reserved(stack: Stack, key: bytes) -> bool:
    return any(name.startswith(b"v:") for name in stack.redis.hkeys(key))
