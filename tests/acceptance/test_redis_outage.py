"""Redis dies under load and comes back on what its disk has: nothing is forgotten, or made up."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable

from tests.acceptance.catalogue import config, plan
from tests.support import wait_until
from tests.support.load import Load, Outcome, get
from tests.support.stack import Stack, Subscriber

CLIENTS = 48
TIMEOUT_S = 1.0
# How much longer than the time-out an answer may take on a machine that is busy with this test.
SLACK_S = 1.0

CONFIG = config(plan("quota", "monthly: {period: billing, limit: 1000000}"), timeout="1s")


def _check_counts(stack: Stack, who: Subscriber, outcome: Outcome) -> None:
    """What was answered 200 was counted and served, and what was answered 503 was not.

    A request whose check was on its way when Redis went may have been counted all the same, on
    disk: the gateway finds out when Redis is back, and takes it back.
    """
    admitted = outcome.count(200)
    assert outcome.all_statuses() == {200, 503}
    assert outcome.lost == 0

    def exact() -> bool:
        found = stack.state(who), stack.ledger(who), stack.ledger_hours(who)
        return all(it["requests"].total == admitted for it in found)

    wait_until(exact, 30, f"{admitted} requests, everywhere")
    # A 503 never reached the upstream, a 200 did once.
    assert stack.served(who.id) == admitted


def test_killed_and_restarted(own_stack: Callable[..., Stack], load: Load) -> None:
    stack = own_stack(CONFIG, gateways=(1, 1))
    who = stack.subscribe("quota")
    request = get("/api/x", who.key, who=who.id)
    load.start(stack.ports, [request], connections=CLIENTS, records=True)
    wait_until(lambda: load.progress().count(200) > 500, what="requests before the kill")
    stack.valkey.kill()
    before = load.progress().count(503)
    wait_until(lambda: load.progress().count(503) > before + 500, what="requests without Redis")

    answer = stack.get("/api/x", who.key)
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["type"].endswith("#temporary-reduced-capacity")
    assert answer.json()["request_id"]
    assert [stack.get("/-/readyz", gateway=n).status_code for n in (0, 1)] == [503, 503]
    assert stack.get("/-/healthz").status_code == 200

    stack.valkey.restart()
    back = time.monotonic()
    after = load.progress().count(200)
    wait_until(lambda: load.progress().count(200) > after + 500, what="requests after the restart")
    assert stack.get("/-/readyz").status_code == 200
    outcome = load.stop()

    _check_counts(stack, who, outcome)
    out = [end - began for _, status, began, end in outcome.records if status == 503]
    assert max(out) < TIMEOUT_S + SLACK_S
    assert statistics.median(out) < 0.1  # at once: nobody waits in line for a Redis that is gone
    # Both gateways found it again soon.
    assert not [
        row for row in outcome.records if row[1] == 503 and row[2] > back + TIMEOUT_S + SLACK_S
    ]


def test_stalled_and_released(own_stack: Callable[..., Stack], load: Load) -> None:
    """A Redis that holds its connections and says nothing: time-outs, not refused connections."""
    stack = own_stack(CONFIG)
    who = stack.subscribe("quota")
    request = get("/api/x", who.key, who=who.id)
    load.start(stack.ports, [request], connections=CLIENTS, records=True)
    wait_until(lambda: load.progress().count(200) > 500, what="requests before the stall")
    os.kill(stack.valkey.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: load.progress().count(503) > 500, what="requests without Redis")
    finally:
        os.kill(stack.valkey.pid, signal.SIGCONT)
    after = load.progress().count(200)
    wait_until(lambda: load.progress().count(200) > after + 500, what="requests after the stall")
    outcome = load.stop()

    _check_counts(stack, who, outcome)
    out = [end - began for _, status, began, end in outcome.records if status == 503]
    assert max(out) < TIMEOUT_S + SLACK_S
    assert statistics.median(out) < 0.1
