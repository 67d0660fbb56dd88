"""Gateway processes come and go under load: what was admitted is answered, slots come back."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from tests.acceptance.catalogue import config, plan
from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack

LEASE_S = 2
CONFIG = config(
    plan("slots", f"in_flight: {{concurrency: 5, lease: {LEASE_S}s}}")
    + plan("busy", "monthly: {period: billing, limit: 1000000}")
)


@pytest.fixture
def two_workers(own_stack: Callable[..., Stack]) -> Stack:
    return own_stack(CONFIG, gateways=(2,))


def _workers(stack: Stack, gateway: int = 0) -> list[psutil.Process]:
    return psutil.Process(stack.gateways[gateway].pid).children()


def _worker_of(stack: Stack, connection: socket.socket) -> psutil.Process:
    """The worker that accepted this connection."""

    def find() -> psutil.Process | None:
        peer = connection.getsockname()
        for worker in _workers(stack):
            if any(there.raddr == peer for there in worker.net_connections("tcp")):
                return worker
        return None

    found = wait_until(find, what="the worker of a connection")
    assert found is not None
    return found


@contextmanager
def _connections_to_one_worker(
    stack: Stack, count: int
) -> Iterator[tuple[psutil.Process, list[socket.socket]]]:
    """The kernel spreads connections over the workers: those of another one are not used."""
    opened: list[socket.socket] = []
    mine: list[socket.socket] = []
    victim: psutil.Process | None = None
    try:
        while len(mine) < count:
            connection = socket.create_connection(("127.0.0.1", stack.ports[0]))
            connection.settimeout(30)
            opened.append(connection)
            worker = _worker_of(stack, connection)
            victim = victim or worker
            if worker.pid == victim.pid:
                mine.append(connection)
        assert victim is not None
        yield victim, mine
    finally:
        for connection in opened:
            connection.close()


def test_a_killed_worker_is_replaced_and_its_slots_come_back(
    two_workers: Stack, load: Load
) -> None:
    stack = two_workers
    slots, busy = stack.subscribe("slots"), stack.subscribe("busy")
    noise = get("/api/x", busy.key, who=busy.id)
    load.start(stack.ports, [noise], connections=12, reopen=True)
    try:
        wait_until(lambda: load.progress().count(200) > 100, what="load")
        with _connections_to_one_worker(stack, 5) as (victim, connections):
            for connection in connections:
                connection.sendall(get("/api/hold", slots.key, who=slots.id).encode())
            wait_until(lambda: stack.served(slots.id) == 5, what="all slots taken")
            assert stack.get("/api/x", slots.key).status_code == 429
            # Renewed meanwhile: they outlive their lease as long as their worker lives.
            begun = time.monotonic()
            wait_until(
                lambda: (
                    time.monotonic() > begun + 1.5 * LEASE_S
                    and stack.get("/api/x", slots.key).status_code == 429
                ),
                deadline_s=3 * LEASE_S,
                what="leases renewed",
            )
            old = {worker.pid for worker in _workers(stack)}
            victim.kill()
            killed = time.monotonic()
            for connection in connections:
                assert _ended(connection)

        # Nobody gives the slots back; they expire.
        wait_until(
            lambda: stack.get("/api/x", slots.key).status_code == 200,
            deadline_s=LEASE_S + 1,
            what="slots free again",
        )
        assert time.monotonic() - killed < LEASE_S + 1
        wait_until(
            lambda: (
                len({worker.pid for worker in _workers(stack)} - old) == 1
                and len(_workers(stack)) == 2
            ),
            what="a new worker",
        )
        wait_until(lambda: _next_worker(stack) not in old, what="the new worker serving")
    finally:
        stack.release()
        outcome = load.stop()
    assert outcome.all_statuses() == {200}
    # Only what was in flight in the killed worker had no answer, one request a connection: whoever
    # came back at once waited in the queue for its replacement.
    assert outcome.lost <= 12
    assert outcome.refused == 0
    stack.quiet()
    counted = stack.state(busy)["requests"].total
    assert outcome.total <= counted <= outcome.total + outcome.lost
    assert stack.ledger(busy)["requests"].total == counted


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def _next_worker(stack: Stack) -> int:
    """Which worker is given the next connection."""
    with socket.create_connection(("127.0.0.1", stack.ports[0])) as connection:
        return _worker_of(stack, connection).pid


def test_sigterm_drains(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(CONFIG, gateways=(2, 1))
    who = stack.subscribe("busy")
    gateway = stack.gateways[0]
    with ThreadPoolExecutor(20) as pool:
        answers = [
            pool.submit(stack.get, "/api/hold", who.key, headers={"x-who": who.id})
            for _ in range(20)
        ]
        wait_until(lambda: stack.seen()["in_flight"] == 20, what="20 requests in flight")
        workers = _workers(stack)
        gateway.signal(signal.SIGTERM)

        def closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", stack.ports[0]), timeout=1).close()
            except ConnectionRefusedError:
                return True
            return False

        wait_until(closed, what="no new connections")
        assert gateway.popen.poll() is None, "ended with requests in flight"
        stack.release()
        assert [answer.result().status_code for answer in answers] == [200] * 20
    assert gateway.wait(10) == 0
    assert not [worker for worker in workers if worker.is_running()]
    stack.flushed(who, 20)
    assert stack.served(who.id) == 20
    assert stack.get("/api/x", who.key, gateway=1).status_code == 200  # the other one serves on


def test_a_gateway_that_stops_under_load_answers_whatever_it_counted(
    own_stack: Callable[..., Stack], load: Load
) -> None:
    stack = own_stack(CONFIG, gateways=(2, 1))
    who = stack.subscribe("busy")
    kept = get("/api/slow?ms=2", who.key, who=who.id)
    opened = get("/api/x", who.key, who=who.id, close=True)
    load.start(stack.ports, [kept, opened, kept], connections=24, reopen=True)
    wait_until(lambda: load.progress().count(200) > 300, what="load on both gateways")
    assert stack.gateways[0].terminate(10) == 0
    after = load.progress().count(200)
    wait_until(lambda: load.progress().count(200) > after + 300, what="the other one serving on")
    outcome = load.stop()
    assert outcome.all_statuses() == {200}
    assert outcome.lost == 0  # whoever was let in was answered; others were refused
    assert outcome.refused > 0
    stack.flushed(who, outcome.total)
    assert stack.served(who.id) == outcome.total


def test_what_is_cut_off_at_the_limit_gives_back_slots_and_charges(
    own_stack: Callable[..., Stack],
) -> None:
    text = CONFIG.replace(f"lease: {LEASE_S}s", "lease: 1h").replace("drain: 5s", "drain: 1s")
    route = "{match: {path: /api/*}, upstream: api"
    assert route in text
    stack = own_stack(text.replace(route, route + ", charge: on_response"), gateways=(1, 1))
    who = stack.subscribe("slots")
    with ThreadPoolExecutor(5) as pool:
        cut = [pool.submit(stack.get, "/api/hold", who.key) for _ in range(5)]
        wait_until(lambda: stack.seen()["in_flight"] == 5, what="all slots taken")
        assert stack.get("/api/x", who.key, gateway=1).status_code == 429
        assert stack.gateways[0].terminate(20) == 0
        assert stack.leases(who, "in_flight") == 0
        assert stack.get("/api/x", who.key, gateway=1).status_code == 200
        assert all(answer.exception() is not None for answer in cut)
    assert stack.state(who)["requests"].total == 1
    stack.flushed(who, 1)


def test_a_killed_gateway_leaves_no_worker_behind(two_workers: Stack) -> None:
    stack = two_workers
    who = stack.subscribe("slots")
    assert stack.get("/api/x", who.key).status_code == 200
    workers = _workers(stack)
    assert len(workers) == 2
    stack.gateways[0].kill()
    try:
        wait_until(
            lambda: not [worker for worker in workers if worker.is_running()], what="no worker left"
        )
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()
    wait_until(lambda: stack.leases(who, "in_flight") == 0, what="slots given back")
