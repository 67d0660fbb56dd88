"""Redis is away: each route does as its `outage` says, and what it served is counted, once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core import clock
from core.admission.program import compile_program
from core.period import HOUR_MS, billing_period
from gateway.outage import entries
from gateway.outage.spool import Spool
from tests.acceptance.conftest import NewDatabase
from tests.acceptance.test_memory import MIB, children, resident
from tests.integration.admission.stack import METERS
from tests.support import wait_until
from tests.support.door import Door
from tests.support.load import Load, get
from tests.support.scripts import plan_of
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber, Use, start_stack

if TYPE_CHECKING:
    import httpx

CLIENTS = 12
LOCAL = 40  # so that each of two workers has a share of 20
DEADLINE_S = 30

_CONFIG = """
gateway:
  drain: 2s
  outage: {spool_dir: "%(spool)s"}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: %(timeout)s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms, lease: 1s}
log: {format: json, level: warning}
upstreams: {api: {urls: ["${UPSTREAM}"]}}
routes:
  - {match: {path: /open/*}, upstream: api, outage: open}
  - {match: {path: /local/*}, upstream: api, outage: local}
  - {match: {path: /*}, upstream: api}
plans:
  small: {limits: {monthly: {period: billing, limit: 40}}}
  over: {limits: {monthly: {period: billing, limit: 10, action: overage}}}
  large: {limits: {monthly: {period: billing, limit: 1000000}}}
"""


def config(spool: Path | None, timeout: str = "1s") -> str:
    """Three routes, one for each mode; without a spool the closed one alone."""
    text = _CONFIG % {"spool": spool or "", "timeout": timeout}
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if spool or not ("/open/" in line or "/local/" in line))


@contextmanager
def away(stack: Stack, how: str) -> Iterator[None]:
    """Redis is killed, or holds its connections and says nothing; afterwards it is back."""
    if how == "killed":
        stack.valkey.kill()
    else:
        os.kill(stack.valkey.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if how == "killed":
            stack.valkey.restart()
        else:
            os.kill(stack.valkey.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def spooling(new_database: NewDatabase) -> Iterator[tuple[Stack, Path]]:
    """A gateway of two workers and its spool directory, which tests leave as they found them."""
    with server_directory() as path:
        spool = path / "spool"
        with start_stack(path, config(spool), new_database(), gateways=(2,)) as running:
            yield running, spool


def counted(stack: Stack, who: Subscriber, requests: int, overage: int = 0) -> None:
    """Waits until Redis and the ledger have this total, in the one period and in its hours."""
    use = Use(Decimal(requests), Decimal(overage))

    def everywhere() -> bool:
        found = stack.state(who), stack.ledger(who), stack.ledger_hours(who)
        return all(it.get("requests", Use(Decimal(0))) == use for it in found)

    try:
        wait_until(everywhere, DEADLINE_S)
    except AssertionError:
        found = stack.state(who), stack.ledger(who), stack.ledger_hours(who)
        raise AssertionError(f"not {use} everywhere: {found}") from None


def empty(spool: Path) -> bool:
    return not list(spool.glob("*.spool"))


@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_each_mode_and_what_it_served_is_counted_once(
    spooling: tuple[Stack, Path], load: Load, how: str
) -> None:
    stack, spool = spooling
    closed, opened, local, over = map(stack.subscribe, ("large", "large", "small", "over"))
    for who, path in ((closed, "/x"), (opened, "/open/x"), (local, "/local/x"), (over, "/open/x")):
        assert [stack.get(path, who.key).status_code for _ in range(5)] == [200] * 5
        counted(stack, who, 5)

    with away(stack, how):
        requests = [
            get("/x", closed.key, who=closed.id),
            get("/open/x", opened.key, who=opened.id),
            get("/local/x", local.key, who=local.id),
            get("/open/x", over.key, who=over.id),
        ]
        load.start(stack.ports, requests, connections=CLIENTS, total=400, records=True)
        outcome = load.wait()
        refused = stack.get("/x", closed.key)

        def ask_local() -> httpx.Response:
            return stack.get("/local/x", local.key, headers={"x-who": local.id})

        more = 0
        while (limited := ask_local()).status_code == 200:
            more += 1  # by the worker that had more of its share left
    assert outcome.lost == 0
    served = [outcome.count(200, number) for number in range(4)]
    assert set(outcome.statuses) == {(0, 503), (1, 200), (2, 200), (2, 429), (3, 200)}
    # the share of whoever was asked often enough, and of both no more than the limit
    served[2] += more
    admitted = served[2]
    assert LOCAL // 2 <= admitted <= LOCAL
    # Those that were on their way when Redis went wait for the time-out, and nobody else.
    slow = [end - began for _, _, began, end in outcome.records if end - began >= 1.0]
    assert len(slow) <= CLIENTS

    assert refused.status_code == 503
    assert refused.json()["type"].endswith("#temporary-reduced-capacity")
    assert int(refused.headers["retry-after"]) >= 1
    assert limited.status_code == 429
    assert limited.json()["type"].endswith("#quota-exceeded")
    assert limited.json()["violated-policies"] == ["monthly"]
    assert int(limited.headers["retry-after"]) >= 1
    assert limited.headers["x-ratelimit-remaining"] == "0"
    assert '"monthly";r=0;t=' in limited.headers["ratelimit"]

    counted(stack, closed, 5)
    counted(stack, opened, 5 + served[1])
    counted(stack, local, 5 + admitted)
    counted(stack, over, 5 + served[3], overage=served[3] - 5)
    assert [stack.served(who.id) for who in (closed, opened, local, over)] == served
    wait_until(lambda: empty(spool), DEADLINE_S, "the spools are empty")
    # once and for all: nothing comes a second time
    assert stack.get("/open/x", opened.key).status_code == 200
    counted(stack, opened, 6 + served[1])


def test_workers_killed_in_the_outage_are_replayed_by_others(
    own_stack: Callable[..., Stack], load: Load, tmp_path: Path
) -> None:
    stack = own_stack(config(tmp_path), gateways=(2, 1))
    who = stack.subscribe("large")
    assert stack.get("/open/x", who.key, headers={"x-who": who.id}).status_code == 200
    with away(stack, "killed"):
        request = get("/open/x", who.key, who=who.id)
        load.start(stack.ports, [request], connections=CLIENTS, reopen=True)
        for _ in range(2):
            before = load.progress().count(200)
            wait_until(lambda at=before: load.progress().count(200) > at + 100, DEADLINE_S)
            # one worker of the first gateway, which its supervisor replaces
            os.kill(children(stack.gateways[0].pid)[0], signal.SIGKILL)
            wait_until(lambda: len(children(stack.gateways[0].pid)) == 2, DEADLINE_S)
        # and all of it at last: only the other gateway can find what these wrote down
        workers = children(stack.gateways[0].pid)
        stack.gateways[0].kill()
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        before = load.progress().count(200)
        wait_until(lambda: load.progress().count(200) > before + 100, DEADLINE_S)
        outcome = load.stop()
    served = stack.served(who.id)
    wait_until(lambda: empty(tmp_path), DEADLINE_S, "all spools were adopted and replayed")
    stack.quiet()
    total = int(stack.state(who)["requests"].total)
    counted(stack, who, total)
    # What was answered was served, and what was served was counted. A request that had no answer
    # may have been written down and cut off before it went upstream, or after.
    answered = outcome.count(200) + 1
    assert outcome.all_statuses() == {200}
    assert answered <= served <= total <= answered + outcome.lost
    assert outcome.lost < answered / 4  # a spool that was replayed twice would show


@pytest.mark.parametrize("killed", [False, True], ids=["goes-on", "worker-killed"])
def test_a_batch_whose_answer_was_lost_is_taken_back(
    new_database: NewDatabase, load: Load, tmp_path: Path, killed: bool
) -> None:
    with (
        server_directory() as folder,
        start_stack(folder, config(tmp_path), new_database(), gateways=()) as stack,
        Door(stack.valkey.url) as door,
    ):
        stack.env["TALLYGATE_REDIS_URL"] = door.url  # type: ignore[index]
        gateway = stack.start_gateway(1)
        gateway.wait_for_http(stack.url("/-/readyz"))
        who = stack.subscribe("over")
        assert [stack.get("/x", who.key).status_code for _ in range(8)] == [200] * 8
        counted(stack, who, 8)

        door.set("deaf")
        request = get("/x", who.key, who=who.id)
        outcome = load.run(stack.ports, [request], connections=CLIENTS, total=CLIENTS)
        assert outcome.all_statuses() == {503}
        # counted, overage and all, and in the ledger by now
        before = stack.state(who)["requests"]
        assert before.total > 8
        counted(stack, who, int(before.total), int(before.overage))
        assert stack.served(who.id) == 0
        if killed:
            (worker,) = children(gateway.pid)
            os.kill(worker, signal.SIGKILL)
        door.set("open")
        counted(stack, who, 8)
        wait_until(lambda: empty(tmp_path), DEADLINE_S, "the spool is empty")
        wait_until(lambda: stack.get("/x", who.key).status_code == 200, DEADLINE_S)
        counted(stack, who, 9)


def test_without_a_spool_a_lost_answer_is_taken_back_too(
    new_database: NewDatabase, load: Load
) -> None:
    with (
        server_directory() as folder,
        start_stack(folder, config(None), new_database(), gateways=()) as stack,
        Door(stack.valkey.url) as door,
    ):
        stack.env["TALLYGATE_REDIS_URL"] = door.url  # type: ignore[index]
        stack.start_gateway(1).wait_for_http(stack.url("/-/readyz"))
        who = stack.subscribe("large")
        assert stack.get("/x", who.key).status_code == 200
        for _ in range(2):
            door.set("deaf")
            request = get("/x", who.key)
            outcome = load.run(stack.ports, [request], connections=CLIENTS, total=CLIENTS)
            assert outcome.all_statuses() == {503}
            assert stack.state(who)["requests"].total > 1
            door.set("open")
            counted(stack, who, 1)


def test_memory_stays_flat_in_an_outage(
    own_stack: Callable[..., Stack], load: Load, tmp_path: Path
) -> None:
    stack = own_stack(config(tmp_path))
    who = stack.subscribe("large")
    assert stack.get("/open/x", who.key).status_code == 200
    (worker,) = children(stack.gateways[0].pid)
    with away(stack, "killed"):
        request = get("/open/x", who.key)
        load.run(stack.ports, [request], connections=64, total=3_000)
        before = resident(worker)
        outcome = load.run(stack.ports, [request], connections=64, total=20_000)
        grown = resident(worker) - before
    assert outcome.all_statuses() == {200}
    assert grown < 6 * MIB, f"{grown / MIB:.1f} MiB"
    counted(stack, who, 23_001)


def test_an_outage_in_the_last_period_is_counted_in_that(
    own_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    """What a dead worker left behind: it belongs to the period and hour it was served in."""
    stack = own_stack(config(tmp_path), gateways=())
    who = stack.subscribe("over")
    now_ms = clock.now_ms()
    last = billing_period(0, 1, billing_period(0, 1, now_ms)[0] - 1)
    before_last = billing_period(0, 1, last[0] - 1)
    program = compile_program(plan_of(), {"requests": 1}, METERS, {})
    caps = {"requests": 10}

    async def leave() -> None:
        spool = Spool(tmp_path, 1 << 20)
        for span, at_ms in (
            (before_last, before_last[1] - 1),
            (last, last[0]),
            (last, last[1] - 1),
        ):
            for _ in range(12):
                await spool.append(entries.admitted(who.id, program, METERS, caps, span, at_ms))
        await spool.close()

    stack.run(leave())
    stack.start_gateway(1).wait_for_http(stack.url("/-/readyz"))
    wait_until(lambda: empty(tmp_path), DEADLINE_S, "adopted and replayed")
    stack.quiet()
    periods = {
        (clock.from_datetime(row["period_start"]), int(row["total"]), int(row["overage"]))
        for row in stack._rows("ledger_of_subject", who.id, 10)
    }
    assert periods == {(before_last[0], 12, 2), (last[0], 24, 14)}
    hours = {
        (clock.from_datetime(row["hour_start"]), int(row["total"]))
        for row in stack._rows(
            "hours_of_subject", who.id, clock.to_datetime(0), clock.to_datetime(now_ms)
        )
    }
    assert hours == {
        (at_ms - at_ms % HOUR_MS, 12) for at_ms in (before_last[1] - 1, last[0], last[1] - 1)
    }
