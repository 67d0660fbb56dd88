"""The whole: what clients were served is what the upstream saw, Redis counts and Postgres keeps."""

from __future__ import annotations

from decimal import Decimal

from tests.support.load import Load, get
from tests.support.stack import Stack, Subscriber, Use


def _agree(stack: Stack, subscriber: Subscriber, expected: dict[str, Use]) -> None:
    stack.quiet()
    assert stack.state(subscriber) == expected
    assert stack.ledger(subscriber) == expected
    assert stack.ledger_hours(subscriber) == expected


def test_clients_upstream_redis_and_ledger_agree_to_the_unit(stack: Stack, load: Load) -> None:
    blocked, paid = stack.subscribe("blocked"), stack.subscribe("paid")
    # One request in four of each subscriber costs credits.
    requests = [
        get(path, who.key, who=who.id)
        for path in ("/api/a", "/api/b", "/heavy/c", "/api/d")
        for who in (blocked, paid)
    ]
    outcome = load.run(stack.ports, requests, connections=90, total=6000)

    light, heavy = {}, {}
    for at, who in enumerate((blocked, paid)):
        light[who.id] = sum(outcome.count(200, index) for index in (at, 2 + at, 6 + at))
        heavy[who.id] = outcome.count(200, 4 + at)
    # The plan that blocks stopped at its limit, to the request; the other never did.
    assert light[blocked.id] + heavy[blocked.id] == 1500
    assert light[paid.id] + heavy[paid.id] == 3000
    assert outcome.all_statuses() == {200, 429}
    assert outcome.count(429) == 1500

    for who in (blocked, paid):
        assert stack.served(who.id) == light[who.id] + heavy[who.id]
        assert stack.served(who.id, "/heavy/c") == heavy[who.id]
    spent = 5 * heavy[blocked.id]
    assert spent > 1000  # beyond its limit, which only warns: counted, never as overage
    _agree(
        stack,
        blocked,
        {"requests": Use(Decimal(1500)), "credits": Use(Decimal(spent))},
    )
    assert heavy[paid.id] == 750
    _agree(
        stack,
        paid,
        {
            "requests": Use(Decimal(3000), Decimal(2000)),
            "credits": Use(Decimal(3750), Decimal(1750)),
        },
    )
