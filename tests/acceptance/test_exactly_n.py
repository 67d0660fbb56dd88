"""200 clients at once over four gateways against a limit of N: exactly N are admitted, each time.

The rounds of one algorithm run one after another, each with a fresh subscription.
"""

from __future__ import annotations

import pytest

from tests.acceptance.catalogue import EXACT, far_from_midnight
from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack

ROUNDS = 20
CLIENTS = 200
LIMIT = 1000
SLOTS = 20


@pytest.mark.parametrize("algorithm", EXACT)
def test_exactly_the_limit_is_admitted(stack: Stack, load: Load, algorithm: str) -> None:
    admitted = []
    for _ in range(ROUNDS):
        far_from_midnight()
        who = stack.subscribe(f"exact_{algorithm}")
        request = get("/api/x", who.key, who=who.id)
        outcome = load.run(stack.ports, [request], connections=CLIENTS, total=LIMIT + 200)
        assert outcome.all_statuses() == {200, 429}
        admitted.append(outcome.count(200))
        assert stack.served(who.id) == LIMIT

        # One limit refuses; the others, and everything else, stay as they were.
        stack.quiet()  # a flush, too, writes to the state: that it did
        before = stack.hash(who)
        answers = [stack.get("/api/x", who.key, gateway=n) for n in range(len(stack.ports))]
        assert [answer.status_code for answer in answers] == [429] * len(stack.ports)
        assert answers[0].json()["violated-policies"] == ["hard"]
        assert stack.hash(who) == before
        assert stack.state(who)["requests"].total == LIMIT
        wait_until(lambda: stack.leases(who, "spare_slots") == 0, what="slots given back")  # noqa: B023
    assert admitted == [LIMIT] * ROUNDS


def test_never_more_at_once_than_there_are_slots(stack: Stack, load: Load) -> None:
    for _ in range(ROUNDS):
        who = stack.subscribe("slots")
        # The upstream holds what is admitted, so the slots stay taken until all have been answered.
        request = get("/api/hold", who.key, who=who.id)
        load.start(stack.ports, [request], connections=CLIENTS, total=CLIENTS)
        try:
            wait_until(lambda: load.progress().total == CLIENTS - SLOTS, what="the others refused")
            wait_until(lambda: stack.seen()["in_flight"] == SLOTS, what="all slots taken")
        finally:
            stack.release()
        outcome = load.wait()
        assert (outcome.count(200), outcome.count(429)) == (SLOTS, CLIENTS - SLOTS)
        assert stack.seen()["peak"][f"{who.id} /api/hold"] == SLOTS
        wait_until(lambda: stack.leases(who, "in_flight") == 0, what="all slots free")  # noqa: B023
        assert stack.state(who)["requests"].total == SLOTS


def test_slots_are_used_again_and_again_and_never_twice_at_once(stack: Stack, load: Load) -> None:
    who = stack.subscribe("slots")
    request = get("/api/slow?ms=5", who.key, who=who.id)
    outcome = load.run(stack.ports, [request], connections=CLIENTS, total=6000)
    assert outcome.all_statuses() == {200, 429}
    assert outcome.count(200) > 10 * SLOTS
    assert stack.seen()["peak"][f"{who.id} /api/slow"] <= SLOTS
    assert stack.served(who.id) == outcome.count(200) == stack.state(who)["requests"].total
    wait_until(lambda: stack.leases(who, "in_flight") == 0, what="all slots free")
