"""A whole gateway in front of an upstream that misbehaves, under a seeded mix of requests at once.

A client never gets a corrupted answer, nor part of one that looks like all of it, nor that of
another request; nothing leaks; and each request is paid for as its route says.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import psutil
import pytest

from tests.chaos_upstream.misfits import (
    ALL,
    CUT,
    EMPTY,
    GATEWAY,
    LARGE,
    SMALL,
    WHOLE,
    Misfits,
    body_of,
)
from tests.support.http1 import Answer, Connection, Cut
from tests.support.servers import NewDatabase, server_directory
from tests.support.stack import Stack, Subscriber, start_stack
from tests.support.wait import wait_until

POOL = 24
CLIENTS = 12
_CONFIG = """
gateway: {drain: 1s}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 5s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
log: {format: json, level: warning}
upstreams:
  misfits:
    urls: ["http://127.0.0.1:%d"]
    timeout: {connect: 10s, response: 1s}
    pool: {max_connections: %d, keepalive: 2s}
routes:
  - {match: {path: /admit/*}, upstream: misfits}
  - {match: {path: /answer/*}, upstream: misfits, charge: on_response}
  - {match: {path: /good/*}, upstream: misfits, charge: {status: [2xx]}}
plans:
  all:
    limits: {year: {period: billing, limit: 1_000_000}}
"""


@dataclass
class World:
    stack: Stack
    misfits: Misfits

    @property
    def port(self) -> int:
        return self.stack.ports[0]

    def counted(self, who: Subscriber) -> int:
        use = self.stack.state(who).get("requests")
        return int(use.total) if use else 0

    def worker(self) -> psutil.Process:
        supervisor = psutil.Process(self.stack.gateways[0].pid)
        return (supervisor.children() or [supervisor])[0]

    def quiet(self) -> None:
        """Nothing is in flight, and no connection to the upstream is left once they are old."""
        wait_until(
            lambda: self.stack.metric("tallygate_requests_in_flight") == 0, what="no request"
        )
        wait_until(lambda: self.misfits.open == 0, what="no connection to the upstream")


@pytest.fixture(scope="module")
def world(new_database: NewDatabase) -> Iterator[World]:
    with (
        server_directory() as path,
        Misfits() as misfits,
        start_stack(path, _CONFIG % (misfits.port, POOL), new_database(), reconcilers=0) as stack,
    ):
        yield World(stack, misfits)


@dataclass
class Tally:
    """What the clients of one subscriber saw."""

    asked: int = 0
    answered: int = 0  # the head of an answer of the upstream
    good: int = 0  # … with a status of 2xx
    abandoned: int = 0
    seen: Counter[str] = field(default_factory=Counter)


def _request(
    key: str, route: str, name: str, number: str, method: str, dice: random.Random
) -> bytes:
    head = f"{method} /{route}/{name}/{number} HTTP/1.1\r\nHost: a\r\nX-API-Key: {key}\r\n".encode()
    if method in ("GET", "HEAD"):
        return head + b"\r\n"
    body = b"b" * dice.choice((0, 5, 3000, 70_000, 200_000))
    if dice.random() < 0.5:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    chunks = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return head + b"Transfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % chunks


def _size(name: str) -> int:
    return LARGE if name == "large" else SMALL


def _judge(name: str, number: str, method: str, answer: Answer) -> None:
    """A complete answer has to be the right one."""
    if answer.status in (502, 504):
        # A request that cannot be sent twice may meet a connection that is just being closed.
        once = method not in ("GET", "HEAD")
        assert name in GATEWAY or name in CUT or once or name.startswith("early"), name
        assert b'"status":50' in answer.body or method == "HEAD"
    elif name in EMPTY:
        assert (str(answer.status), answer.body) == (name, b"")
    else:
        assert answer.status == 200
        assert name in WHOLE or method == "HEAD", f"{name}: a wrong answer passed for a whole one"
        if method != "HEAD":
            assert answer.body == body_of(number, _size(name)), name


def _judge_cut(name: str, number: str, cut: Cut) -> None:
    """An answer that was seen to be cut has to be the beginning of the right one."""
    assert name in CUT, f"{name}: {cut}"
    assert cut.answer is not None, f"{name}: {cut}"
    assert cut.answer.status == 200
    assert body_of(number, LARGE).startswith(cut.partial), name


def _client(world: World, key: str, route: str, seed: int, count: int, resets: float) -> Tally:
    dice = random.Random(seed)
    tally = Tally()
    names = [name for name in sorted(ALL) if not name.startswith("stalls")]
    stalls = [name for name in ALL if name.startswith("stalls")]
    connection: Connection | None = None
    for turn in range(count):
        name = dice.choice(stalls) if turn == count // 2 else dice.choice(names)
        number = f"{route}-{seed}-{turn}"
        method = dice.choice(("GET", "GET", "POST", "PUT", "HEAD", "DELETE"))
        raw = _request(key, route, name, number, method, dice)
        if connection is None:
            connection = Connection(world.port)
        tally.asked += 1
        connection.send(raw)
        if dice.random() < resets:
            if dice.random() < 0.5:
                connection.sock.recv(100)
            connection.reset()
            connection = None
            tally.abandoned += 1
            continue
        try:
            answer = connection.answer(method)
        except Cut as cut:
            _judge_cut(name, number, cut)
            tally.answered += 1
            tally.good += 1
            tally.seen["cut"] += 1
            connection.sock.close()
            connection = None
            continue
        _judge(name, number, method, answer)
        ours = answer.status in (502, 504)
        tally.answered += not ours
        tally.good += not ours and answer.status < 300
        tally.seen[str(answer.status)] += 1
        if answer.says_close:
            connection.sock.close()
            connection = None
    if connection is not None:
        connection.sock.close()
    return tally


def _run(world: World, key: str, route: str, seed: int, count: int, resets: float = 0.0) -> Tally:
    """All clients at once; the sum of what they saw."""
    total = Tally()
    with ThreadPoolExecutor(CLIENTS) as threads:
        futures = [
            threads.submit(_client, world, key, route, seed * 100 + n, count, resets)
            for n in range(CLIENTS)
        ]
        for future in futures:
            part = future.result()
            total.asked += part.asked
            total.answered += part.answered
            total.good += part.good
            total.abandoned += part.abandoned
            total.seen += part.seen
    return total


@pytest.mark.parametrize("route", ["admit", "answer", "good"])
def test_a_mix_under_load(world: World, route: str) -> None:
    who = world.stack.subscribe("all")
    tally = _run(world, who.key, route, 1, 45)
    assert tally.seen["cut"] > 10
    assert tally.seen["502"] > 10
    assert tally.seen["504"] > 0
    assert tally.seen["200"] > 50
    expected = {"admit": tally.asked, "answer": tally.answered, "good": tally.good}[route]
    wait_until(lambda: world.counted(who) == expected, what=f"{expected} of {tally}")
    world.quiet()
    assert world.counted(who) == expected


def test_clients_that_go_away_in_between(world: World) -> None:
    who = world.stack.subscribe("all")
    tally = _run(world, who.key, "admit", 2, 45, resets=0.3)
    assert tally.abandoned > 50
    world.quiet()
    assert tally.asked - tally.abandoned <= world.counted(who) <= tally.asked


def test_what_may_not_be_sent_twice_is_not(world: World) -> None:
    """Over all that was sent so far; idempotent requests are sent again once at most."""
    who = world.stack.subscribe("all")
    dice = random.Random(3)
    with Connection(world.port) as connection:
        for turn in range(60):
            name = dice.choice(("closes-unsaid", "resets-before", "closes-before", "length"))
            raw = _request(who.key, "admit", name, f"post-{turn}", "POST", dice)
            assert connection.exchange(raw).status in (200, 502)
    posts = [n for number, n in world.misfits.executed.items() if number.startswith("post-")]
    assert len(posts) <= 60
    assert max(posts) == 1
    assert max(world.misfits.executed.values()) <= 2
    assert world.counted(who) == 60


def test_nothing_was_leaked(world: World) -> None:
    who = world.stack.subscribe("all")
    worker = world.worker()
    world.quiet()
    files, memory = worker.num_fds(), worker.memory_info().rss
    tally = _run(world, who.key, "admit", 4, 60, resets=0.1)
    assert tally.asked == CLIENTS * 60
    world.quiet()
    wait_until(lambda: worker.num_fds() <= files + 2, what="all sockets closed")
    assert worker.memory_info().rss - memory < 50_000_000
    # The pool's book-keeping is right: as many as it allows can be in use at once, none waits.
    connections = [Connection(world.port) for _ in range(POOL)]
    for n, connection in enumerate(connections):
        raw = _request(who.key, "admit", "trickles", f"pool-{n}", "GET", random.Random(n))
        connection.send(raw)
    for n, connection in enumerate(connections):
        assert connection.answer().body == body_of(f"pool-{n}", SMALL)
        connection.sock.close()
    assert "Traceback" not in world.stack.gateways[0].output
    assert "Task exception was never retrieved" not in world.stack.gateways[0].output


@pytest.mark.parametrize("name", ["chunks-close", "chunks-reset", "large-chunk-close", "bad-chunk"])
def test_a_cut_answer_is_seen_by_a_client_that_knows_no_chunks(world: World, name: str) -> None:
    """Its answers end with the connection; only a reset tells a cut one from a whole one."""
    who = world.stack.subscribe("all")
    raw = f"GET /admit/{name}/old HTTP/1.0\r\nX-API-Key: {who.key}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", world.port), timeout=20) as sock:
        sock.sendall(raw)
        got, reset = b"", False
        try:
            while data := sock.recv(65_536):
                got += data
        except ConnectionResetError:
            reset = True
    # Or it was broken before any of it had been passed on.
    assert reset or got.startswith(b"HTTP/1.1 502")


@pytest.mark.parametrize("name", sorted(WHOLE))
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_whole_answer_however_it_comes(world: World, name: str, method: str) -> None:
    who = world.stack.subscribe("all")
    with Connection(world.port) as connection:
        for turn in range(2):
            number = f"{name}-{method}-{turn}"
            raw = _request(who.key, "good", name, number, method, random.Random(turn))
            _judge(name, number, method, connection.exchange(raw, method))
