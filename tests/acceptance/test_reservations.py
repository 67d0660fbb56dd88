"""Routes that charge for the answer: what is paid for is served, and what is served is paid for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.keyspace import Keyspace
from tests.acceptance.conftest import NewDatabase
from tests.acceptance.test_memory import children
from tests.acceptance.test_outage import away, counted, empty
from tests.support import wait_until
from tests.support.door import Door
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber, start_stack

if TYPE_CHECKING:
    import httpx

RESERVATION_MS = 2_000
DEADLINE_S = 30

_CONFIG = """
gateway:
  drain: 2s
  reservation: 2s
  %(outage)s
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 1s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms, lease: 1s}
log: {format: json, level: warning}
upstreams: {api: {urls: ["${UPSTREAM}"]}}
routes:
  - {match: {path: /paid/*}, upstream: api, charge: {status: ["2xx"]}}
  - {match: {path: /any/*}, upstream: api, charge: on_response}
plans:
  over: {limits: {monthly: {period: billing, limit: 2, action: overage}}}
  large: {limits: {monthly: {period: billing, limit: 1000000}}}
"""


def config(spool: Path | None = None) -> str:
    outage = f'outage: {{spool_dir: "{spool}"}}' if spool else "outage: {}"
    return _CONFIG % {"outage": outage}


@pytest.fixture(scope="module")
def plain(new_database: NewDatabase) -> Iterator[Stack]:
    """A stack without a spool, which tests leave as they found it."""
    with server_directory() as path, start_stack(path, config(), new_database()) as running:
        yield running


def due(stack: Stack, who: Subscriber) -> list[bytes]:
    """Reservations that are open, and those that expired and are remembered."""
    members: list[bytes] = stack.redis.zrange(Keyspace().due(0), 0, -1)
    return [member for member in members if member.endswith(who.id.encode())]


def settled(stack: Stack, who: Subscriber) -> None:
    wait_until(lambda: due(stack, who) == [], DEADLINE_S, "nothing is reserved any more")


def ready(stack: Stack) -> None:
    wait_until(lambda: stack.get("/-/readyz").status_code == 200, DEADLINE_S, "ready")


def reserved(stack: Stack, who: Subscriber) -> list[bytes]:
    return [text for name, text in stack.hash(who).items() if name.startswith(b"v:")]


@contextmanager
def held(stack: Stack, who: Subscriber, path: str) -> Iterator[Future[httpx.Response]]:
    """A request that the upstream has and does not answer yet."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stack.get, f"{path}/hold", who.key, headers={"x-who": who.id})
        wait_until(
            lambda: stack.served(who.id) == 1, DEADLINE_S, "the request is with the upstream"
        )
        assert stack.state(who)["requests"].total == 1
        assert len(reserved(stack, who)) == 1
        yield future


def test_only_what_is_answered_as_the_route_says_is_charged(plain: Stack) -> None:
    stack = plain
    paid, answered = stack.subscribe("over"), stack.subscribe("over")
    for who, path in ((paid, "/paid"), (answered, "/any")):
        for code, times in ((200, 3), (500, 4), (404, 1), (201, 2)):
            for _ in range(times):
                assert stack.get(f"{path}/status?code={code}", who.key).status_code == code
    # a refund gives overage back first: five are paid for, two within the limit
    counted(stack, paid, 5, overage=3)
    counted(stack, answered, 10, overage=8)
    assert stack.upstream is not None
    stack.upstream.kill()
    for who, path in ((paid, "/paid"), (answered, "/any")):
        assert [stack.get(f"{path}/x", who.key).status_code for _ in range(3)] == [502] * 3
    stack.start_upstream().wait_for_http(f"http://127.0.0.1:{stack.upstream_port}/-/seen")
    counted(stack, paid, 5, overage=3)
    counted(stack, answered, 10, overage=8)
    settled(stack, paid)
    settled(stack, answered)


def test_long_request_and_lost_client(plain: Stack) -> None:
    """One is renewed for as long as it takes and charged once; the other is not charged."""
    import socket

    stack = plain
    who, gone = stack.subscribe("large"), stack.subscribe("large")
    with held(stack, who, "/any") as future:
        expiry, made, *_ = map(int, reserved(stack, who)[0].split()[:2])

        def outlived() -> bool:
            seconds, micros = stack.redis.time()
            return seconds * 1000 + micros // 1000 > made + RESERVATION_MS + 500

        with socket.create_connection(("127.0.0.1", stack.ports[0])) as client:
            head = f"GET /any/hold HTTP/1.1\r\nhost: t\r\nx-who: {gone.id}\r\n"
            client.sendall(f"{head}authorization: Bearer {gone.key}\r\n\r\n".encode())
            wait_until(lambda: stack.served(gone.id) == 1, DEADLINE_S, "it is with the upstream")
            assert stack.state(gone)["requests"].total == 1
        counted(stack, gone, 0)

        wait_until(outlived, DEADLINE_S, "longer than the reservation")
        (text,) = reserved(stack, who)
        assert int(text.split()[0]) > expiry
        stack.release()
        assert future.result(DEADLINE_S).status_code == 200
    counted(stack, who, 1)
    counted(stack, gone, 0)
    assert due(stack, who) == due(stack, gone) == []


def test_worker_killed_with_the_request_what_it_reserved_is_taken_back(
    plain: Stack,
) -> None:
    import httpx

    stack = plain
    who, other = stack.subscribe("large"), stack.subscribe("large")
    with held(stack, who, "/any") as future:
        counted(stack, who, 1)  # in the ledger too, for as long as nobody knows better
        (worker,) = children(stack.gateways[0].pid)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            future.result(DEADLINE_S)
    counted(stack, who, 0)
    assert [name[:2] for name in stack.hash(who) if name[:2] in (b"v:", b"x:")] == [b"x:"]
    stack.release()
    wait_until(
        lambda: stack.get("/any/x", other.key).status_code == 200, DEADLINE_S, "another worker"
    )
    counted(stack, other, 1)
    counted(stack, who, 0)


def test_redis_goes_between_admission_and_answer_and_there_is_a_spool(
    own_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    """The answer is served; its confirmation is written down, and charged once."""
    stack = own_stack(config(tmp_path))
    for how in ("killed", "stalled"):
        who = stack.subscribe("large")
        ready(stack)
        with held(stack, who, "/any") as future:
            with away(stack, how):
                stack.release()
                assert future.result(DEADLINE_S).status_code == 200
                assert not empty(tmp_path)
            wait_until(lambda: empty(tmp_path), DEADLINE_S, "the confirmation is replayed")
        settled(stack, who)
        counted(stack, who, 1)


@pytest.mark.parametrize("how", ["killed", "stalled"])
def test_redis_goes_between_admission_and_answer_and_there_is_no_spool(
    plain: Stack, how: str
) -> None:
    """The charge cannot be made durable: the answer is not served, and not charged."""
    stack, who = plain, plain.subscribe("large")
    with held(stack, who, "/any") as future, away(stack, how):
        stack.release()
        answer = future.result(DEADLINE_S)
        assert answer.status_code == 503
        assert answer.json()["type"].endswith("#temporary-reduced-capacity")
    counted(stack, who, 0)
    ready(stack)


def test_expired_while_cut_off_and_served_after_all(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """Taken back by the reconciler, and charged again when the worker can tell."""
    with (
        server_directory() as folder,
        start_stack(folder, config(tmp_path), new_database(), gateways=()) as stack,
        Door(stack.valkey.url) as door,
    ):
        stack.env["TALLYGATE_REDIS_URL"] = door.url  # type: ignore[index]
        stack.start_gateway(1).wait_for_http(stack.url("/-/readyz"))
        who = stack.subscribe("large")
        with held(stack, who, "/paid") as future:
            door.set("shut")
            counted(stack, who, 0)  # expired
            stack.release()
            assert future.result(DEADLINE_S).status_code == 200
        counted(stack, who, 0)
        door.set("open")
        counted(stack, who, 1)
        settled(stack, who)
        wait_until(lambda: empty(tmp_path), DEADLINE_S, "the confirmation is replayed")
        counted(stack, who, 1)
