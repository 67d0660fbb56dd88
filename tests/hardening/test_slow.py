"""Clients that are slow, or take nothing: they cost a bounded time and a bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from tests.hardening.check import World
from tests.hardening.conftest import config
from tests.hardening.rows import req
from tests.support.http1 import Connection, Cut
from tests.support.wait import wait_until

_SHORT = "client: {head_timeout: 2s, body_timeout: 2s, idle_timeout: 3s}"


@pytest.fixture(scope="module")
def hasty(world: World) -> int:
    """The port of a second gateway, with short time-outs; the first one keeps its own."""
    world.stack.write_config(config(world.recorder.port, _SHORT))
    process = world.stack.start_gateway(1)
    port = world.stack.ports[-1]
    process.wait_for_http(f"http://127.0.0.1:{port}/-/readyz")
    return port


def test_slow_clients_are_let_go(world: World, hasty: int) -> None:
    large = world.fill(req(b"POST /cut HTTP/1.1", b"Content-Length: 900000", body=b"x" * 100_000))
    stalled = {
        # What is sent, and what is answered: 0 for an end without an answer.
        "nothing": (b"", 0),
        "half a head": (b"GET /slow HTTP/1.1\r\nHost: a\r\nX-A: ", 408),
        "half a line": (b"GET /sl", 408),
        "half a body": (req(b"POST /slow HTTP/1.1", b"Content-Length: 9", body=b"abc"), 408),
        "half a chunk": (
            req(b"POST /slow HTTP/1.1", b"Transfer-Encoding: chunked", body=b"9\r\nabc"), 408,
        ),
        "no last chunk": (
            req(b"POST /slow HTTP/1.1", b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n"), 408,
        ),
        "of a large body": (large, 408),
    }  # fmt: skip
    greedy = Connection(hasty)
    body = b"y" * 60_000
    flood = world.fill(req(b"POST /big HTTP/1.1", b"Content-Length: %d" % len(body), body=body))
    assert _is_held_up(greedy, flood, 4000)
    counted, mark = world.counted(), len(world.recorder.requests)
    waiting = {name: Connection(hasty, deadline_s=15) for name in stalled}
    idle = Connection(hasty, deadline_s=15)
    assert idle.exchange(world.good(path="/idle")).status == 200
    for name, connection in waiting.items():
        connection.send(world.fill(stalled[name][0]))
    with Connection(hasty, deadline_s=15) as dripping:
        dripping.send(b"GET /slow HTTP/1.1\r\nHost: a\r\nX-A: ")
        for _ in range(200):  # a byte now and then does not prolong it
            if not dripping.silent_for(0.1):
                break
            dripping.send(b"a")
        assert dripping.answer().status == 408
        assert dripping.ended() == b""
    for name, connection in waiting.items():
        status = stalled[name][1]
        if status:
            assert connection.answer().status == status, name
        assert connection.ended() == b"", name
        connection.sock.close()
    assert idle.ended() == b""
    wait_until(lambda: _is_let_go(world, greedy), 20, "the end of who reads no answers")
    assert [seen.target for seen in world.seen_since(mark)] == ["/idle"]
    assert world.counted() - counted <= 1 + 4
    # Of the large one the application had begun to read: it sees the end of the connection.
    assert all(stray.endswith(b"<the end>") for stray in world.recorder.strays)


def test_a_slow_body_that_goes_on_is_taken(world: World, hasty: int) -> None:
    mark = len(world.recorder.requests)
    with Connection(hasty) as connection:
        connection.send(world.fill(req(b"POST /drip HTTP/1.1", b"Content-Length: 8")))
        for _ in range(8):
            assert connection.silent_for(0.4)
            connection.send(b"x")
        assert connection.answer().status == 200
    assert [seen.body for seen in world.seen_since(mark)] == [b"x" * 8]


def _is_held_up(
    connection: Connection,
    raw: bytes,
    times: int,
    between: Callable[[], object] = lambda: None,
) -> bool:
    """Sends again and again; whether that comes to a stop because it is not read any more."""
    connection.sock.settimeout(1)
    try:
        for _ in range(times):
            connection.sock.sendall(raw)
            between()
    except TimeoutError:
        return True
    return False


def _is_let_go(world: World, connection: Connection) -> bool:
    """Whether no gateway has the other end of the connection any more."""
    port = connection.sock.getsockname()[1]
    return not any(
        other.raddr and other.raddr.port == port
        for gateway in world.stack.gateways
        for process in _processes(gateway.pid)
        for other in process.net_connections("tcp")
    )


def _processes(supervisor: int) -> list[psutil.Process]:
    process = psutil.Process(supervisor)
    return [process, *process.children(recursive=True)]


def _memory(world: World, gateway: int = 0) -> int:
    processes = _processes(world.stack.gateways[gateway].pid)
    return sum(process.memory_info().rss for process in processes)


def test_unread_answers_are_bounded(world: World) -> None:
    """Each answer is 60 kB; all of them together would be hundreds of megabytes."""
    world.stack.redis.ping()
    body = b"y" * 60_000
    raw = world.fill(req(b"POST /big HTTP/1.1", b"Content-Length: %d" % len(body), body=body))
    before = _memory(world)
    mark = len(world.recorder.requests)
    with Connection(world.port, deadline_s=1) as greedy:
        assert _is_held_up(greedy, raw, 4000)
        assert _memory(world) - before < 60_000_000
        begun = len(world.recorder.requests) - mark
        assert begun < 1000
        greedy.sock.settimeout(10)
        for _ in range(min(begun, 20)):  # and goes on when its answers are
            assert greedy.answer().status == 200
    wait_until(lambda: world.stack.metric("tallygate_requests_in_flight") == 0)
    world.recorder.strays.clear()
    del world.recorder.requests[mark:]


def test_small_requests_sent_ahead_are_bounded(world: World) -> None:
    before = _memory(world)
    mark = len(world.recorder.requests)
    raw = world.good(path="/ahead") * 1000
    with Connection(world.port) as greedy:
        assert _is_held_up(greedy, raw, 1000)
        assert _memory(world) - before < 60_000_000
        greedy.reset()
    wait_until(lambda: world.stack.metric("tallygate_requests_in_flight") == 0)
    del world.recorder.requests[mark:]


def test_what_is_sent_ahead_of_a_slow_answer_is_bounded(world: World) -> None:
    before = _memory(world)
    mark = len(world.recorder.requests)
    body = b"y" * 60_000
    raw = world.fill(req(b"POST /ahead HTTP/1.1", b"Content-Length: %d" % len(body), body=body))
    with Connection(world.port) as greedy:
        first = req(b"POST /wait HTTP/1.1", b"Content-Length: 3", body=b"abc")
        # Each piece begins and ends within a body, and is read before the next is sent.
        greedy.send(world.fill(first) + raw + raw[:30_000])
        piece = raw[30_000:] + raw[:30_000]
        assert _is_held_up(greedy, piece, 800, lambda: world.seen_since(mark))
        assert _memory(world) - before < 20_000_000
        assert [seen.target for seen in world.seen_since(mark)] == ["/wait"]
        world.recorder.release()
        greedy.sock.settimeout(20)
        assert greedy.answer().status == 200
        assert greedy.answer().status == 200
        greedy.reset()
    wait_until(lambda: world.stack.metric("tallygate_requests_in_flight") == 0)
    world.recorder.strays.clear()
    del world.recorder.requests[mark:]


def test_endless_trailers_are_bounded(world: World) -> None:
    before = _memory(world)
    head = req(b"POST /cut HTTP/1.1", b"Transfer-Encoding: chunked", body=b"0\r\nX-A: ")
    with Connection(world.port) as endless:
        endless.send(world.fill(head))
        for _ in range(300):
            endless.send(b"a" * 100_000)
        with suppress(Cut):  # it may not wait until all is read
            assert endless.answer().status == 400
    assert _memory(world) - before < 20_000_000
