"""A rolling restart under load: workers are replaced, and no client can tell."""

from __future__ import annotations

import signal
from collections.abc import Callable

import psutil

from tests.acceptance.catalogue import config, plan
from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack

WORKERS = 2
ROLLS = 2
CONFIG = config(plan("busy", "monthly: {period: billing, limit: 1000000}"))


def _workers(stack: Stack) -> set[int]:
    return {worker.pid for worker in psutil.Process(stack.gateways[0].pid).children()}


def _all_serving(stack: Stack) -> set[int]:
    """The workers, once each of them serves its socket."""

    def found() -> set[int]:
        serving = set()
        for worker in psutil.Process(stack.gateways[0].pid).children():
            if any(there.status == psutil.CONN_LISTEN for there in worker.net_connections("tcp")):
                serving.add(worker.pid)
        return serving if len(serving) == WORKERS else set()

    return wait_until(found, what="all workers serving")


def _roll(stack: Stack) -> None:
    """Until each worker is another one, and none of the old ones is left."""
    old = _workers(stack)
    stack.gateways[0].signal(signal.SIGUSR2)
    wait_until(
        lambda: len(_workers(stack)) == WORKERS and not _workers(stack) & old,
        deadline_s=60,
        what="all workers replaced",
    )


def test_no_request_is_lost_and_none_counted_twice(
    own_stack: Callable[..., Stack], load: Load
) -> None:
    stack = own_stack(CONFIG, gateways=(WORKERS,))
    who = stack.subscribe("busy")
    kept = get("/api/slow?ms=5", who.key, who=who.id)
    opened = get("/api/x", who.key, who=who.id, close=True)
    supervisor = psutil.Process(stack.gateways[0].pid)
    load.start(stack.ports, [kept, opened, kept], connections=18, reopen=True)
    try:
        wait_until(lambda: load.progress().count(200) > 300, what="load")
        _roll(stack)  # the first one may import what was not needed before
        before = supervisor.num_fds(), supervisor.memory_info().rss
        for _ in range(ROLLS):
            _roll(stack)
        after = supervisor.num_fds(), supervisor.memory_info().rss
        served = load.progress().count(200)
        wait_until(lambda: load.progress().count(200) > served + 300, what="load after the rolls")
    finally:
        outcome = load.stop()
    assert (outcome.lost, outcome.refused) == (0, 0)
    assert outcome.all_statuses() == {200}
    assert after[0] == before[0], "descriptors were left open"
    assert after[1] < before[1] + 2 * 2**20
    assert len(supervisor.children(recursive=True)) == WORKERS
    stack.flushed(who, outcome.total)
    assert stack.served(who.id) == outcome.total


def test_a_roll_that_fails_changes_nothing(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(CONFIG, gateways=(WORKERS,))
    (gateway,) = stack.gateways
    who = stack.subscribe("busy")
    workers = _all_serving(stack)
    # No worker could start with it: none is tried.
    stack.write_config(CONFIG.replace("plans:", "plan:"))
    gateway.signal(signal.SIGUSR2)
    gateway.wait_for_output("roll_aborted")
    # Valid, but a worker finds out that it cannot use it.
    stack.write_config(CONFIG + "telemetry: {metrics_dir: /dev/null/metrics}\n")
    gateway.signal(signal.SIGUSR2)
    wait_until(lambda: gateway.output.count("roll_aborted") == 2, 20, "the second roll given up")
    assert "it ended with status 1" in gateway.output
    assert _workers(stack) == workers
    assert stack.get("/api/x", who.key).status_code == 200
    stack.write_config(CONFIG)
    _roll(stack)
    assert stack.get("/api/x", who.key).status_code == 200


def test_a_stop_in_the_middle_of_a_roll_stops_all(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(CONFIG, gateways=(WORKERS,))
    (gateway,) = stack.gateways
    _all_serving(stack)
    gateway.signal(signal.SIGUSR2)
    wait_until(lambda: len(_workers(stack)) > WORKERS, what="a successor")
    workers = [psutil.Process(pid) for pid in _workers(stack)]
    assert gateway.terminate() == 0
    assert not [worker for worker in workers if worker.is_running()]
