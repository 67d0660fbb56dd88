"""What changes in Postgres takes effect in every worker within a second; its absence does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cli.embedded import EmbeddedPostgres
from core.db.migrate import migrate
from tests.acceptance.catalogue import config, plan
from tests.support import free_port, wait_until
from tests.support.load import Load, get
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber


def _statuses(stack: Stack, who: Subscriber) -> list[int]:
    return [
        stack.get("/api/x", who.key, gateway=number).status_code
        for number in range(len(stack.ports))
    ]


def _known(stack: Stack, plan: str) -> Subscriber:
    """A subscriber that every worker has in its cache."""
    who = stack.subscribe(plan)
    assert _statuses(stack, who) == [200] * 4
    return who


def _within_a_second(stack: Stack, who: Subscriber, status: int) -> None:
    wait_until(lambda: _statuses(stack, who) == [status] * 4, 1.0, f"{status} from every worker")


def test_a_revoked_key_is_refused(stack: Stack) -> None:
    who, bystander = _known(stack, "thousands"), _known(stack, "thousands")
    stack.directory("revoke_key", who.key_id)
    _within_a_second(stack, who, 401)
    assert _statuses(stack, bystander) == [200] * 4


def test_a_key_switched_off_is_refused_and_works_again(stack: Stack) -> None:
    who = _known(stack, "thousands")
    stack.directory("update_key", who.key_id, active=False)
    _within_a_second(stack, who, 403)
    stack.directory("update_key", who.key_id, active=True)
    _within_a_second(stack, who, 200)


@pytest.mark.parametrize(
    ("status", "answer"), [("canceled", 403), ("past_due", 402), ("paused", 403)]
)
def test_a_status_refuses_and_admits_again(stack: Stack, status: str, answer: int) -> None:
    who = _known(stack, "thousands")
    stack.directory("set_status", who.id, status)
    _within_a_second(stack, who, answer)
    used = stack.state(who)["requests"].total
    assert _statuses(stack, who) == [answer] * 4
    assert stack.state(who)["requests"].total == used  # refused, so not counted
    stack.directory("set_status", who.id, "active")
    _within_a_second(stack, who, 200)


def test_a_plan_change_keeps_what_was_consumed(stack: Stack, load: Load) -> None:
    who = stack.subscribe("small")
    request = get("/api/x", who.key, who=who.id)
    assert load.run(stack.ports, [request], connections=8, total=30).count(200) == 20
    stack.directory("set_plan", who.id, "doubled")

    def moved() -> bool:
        answers = [stack.get("/api/x", who.key, gateway=number) for number in range(4)]
        return all(answer.headers["x-ratelimit-limit"] == "40" for answer in answers)

    wait_until(moved, 1.0, "the new plan in every worker")
    load.run(stack.ports, [request], connections=8, total=30)
    assert stack.state(who)["requests"].total == 40
    stack.directory("set_plan", who.id, "small")  # and back: nothing is given away
    wait_until(
        lambda: stack.get("/api/x", who.key).headers["x-ratelimit-limit"] == "20", 1.0, "back"
    )
    assert _statuses(stack, who) == [429] * 4
    stack.flushed(who, 40)


def test_postgres_dies_and_comes_back(own_stack: Callable[..., Stack]) -> None:
    with (
        server_directory() as path,
        EmbeddedPostgres(path / "postgres", port=free_port()) as postgres,
    ):
        asyncio.run(migrate(postgres.url))
        stack = own_stack(
            config(plan("quota", "monthly: {period: billing, limit: 1000}")),
            postgres=postgres.url,
        )
        known, stranger = stack.subscribe("quota"), stack.subscribe("quota")
        assert stack.get("/api/x", known.key).status_code == 200
        stack.flushed(known, 1)

        postgres.kill()
        for _ in range(50):
            assert stack.get("/api/x", known.key).status_code == 200
        answer = stack.get("/api/x", stranger.key)
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) >= 1
        ready = stack.get("/-/readyz")
        assert (ready.status_code, ready.json()["redis"]) == (200, "ok")
        assert stack.get("/api/x", known.key).status_code == 200

        postgres.restart()
        wait_until(
            lambda: stack.get("/api/x", stranger.key).status_code == 200, what="the new key known"
        )
        stack.flushed(known, 52)
        # Changes are heard again.
        stack.directory("revoke_key", known.key_id)
        wait_until(lambda: stack.get("/api/x", known.key).status_code == 401, what="the revocation")
        postgres.stop()
