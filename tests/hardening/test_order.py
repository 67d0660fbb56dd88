"""Several requests on a connection, and requests in pieces: nothing is executed that should not."""

from __future__ import annotations

import random
import re

import pytest

from tests.hardening.check import World
from tests.hardening.rows import HOST, KEY, post, req
from tests.support.http1 import Connection, Cut, ask
from tests.support.recorder import Seen
from tests.support.wait import wait_until

_CHUNKED = b"Transfer-Encoding: chunked"


def _targets(seen: list[Seen]) -> list[str]:
    return [f"{one.method} {one.target}" for one in seen]


def test_requests_sent_ahead_are_answered_in_order(world: World) -> None:
    bodies = [b"x" * random.Random(n).randrange(1, 9000) for n in range(6)]
    requests = [
        req(b"GET /a HTTP/1.1"),
        req(b"HEAD /b HTTP/1.1"),
        req(b"POST /c HTTP/1.1", b"Content-Length: %d" % len(bodies[0]), body=bodies[0]),
        req(
            b"PUT /d HTTP/1.1",
            _CHUNKED,
            body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(bodies[1]), bodies[1]),
        ),
        b"\r\n" + req(b"DELETE /e HTTP/1.1"),
        req(b"GET /nokey HTTP/1.1", key=None),
        req(b"POST /f HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 3", body=b"abc"),
        req(b"POST /g HTTP/1.1", b"Content-Length: %d" % len(bodies[2]), body=bodies[2]),
        req(b"GET /h HTTP/1.1", b"Upgrade: foo", b"Connection: upgrade"),
        req(b"GET /i HTTP/1.1"),
    ]
    counted, mark = world.counted(), len(world.recorder.requests)
    with Connection(world.port) as connection:
        last = req(b"GET /last HTTP/1.1", b"Connection: close")
        connection.send(world.fill(b"".join(requests * 3) + last))
        for _ in range(3):
            for raw in requests:
                method = raw.lstrip(b"\r\n").split(b" ")[0].decode()
                target = raw.split(b" ")[1].decode()
                answer = connection.answer(method)
                if target == "/nokey":
                    assert answer.status == 401
                elif method != "HEAD":
                    assert answer.body.startswith(f"{method} {target} HTTP/1.1\r\n".encode())
                assert not answer.says_close
        assert connection.answer().says_close
        assert connection.ended() == b""
    one = ["GET /a", "HEAD /b", "POST /c", "PUT /d", "DELETE /e", "POST /f", "POST /g", "GET /h"]
    assert _targets(world.seen_since(mark)) == [*one, "GET /i"] * 3 + ["GET /last"]
    assert world.counted() - counted == 28
    assert not world.recorder.strays


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense\r\n\r\n",
        req(b"GET /bad HTTP/1.1", b"X : y"),
        post(b"Content-Length: 3", _CHUNKED, body=b"0\r\n\r\n"),
        post(b"Content-Length: 1", b"Content-Length: 2", body=b"ab"),
        req(b"GET /bad HTTP/2.0"),
        b"\x00\x00\x00\x00",
        req(b"CONNECT /bad HTTP/1.1"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_nothing_after_an_error_is_executed(world: World, bad: bytes, together: bool) -> None:
    good = req(b"GET /good HTTP/1.1")
    evil = req(b"GET /evil HTTP/1.1") * 3
    counted, mark = world.counted(), len(world.recorder.requests)
    with Connection(world.port) as connection:
        if together:
            connection.send(world.fill(good + bad + evil))
            assert connection.answer().status == 200
        else:
            connection.send(world.fill(good))
            assert connection.answer().status == 200
            connection.send(world.fill(bad + evil))
        assert connection.answer().status in (400, 501, 505)
        assert connection.ended() == b""
    assert _targets(world.seen_since(mark)) == ["GET /good"]
    assert world.counted() - counted == 1


def test_nothing_after_a_broken_body_is_executed(world: World) -> None:
    mark = len(world.recorder.requests)
    with Connection(world.port) as connection:
        bad = post(_CHUNKED, body=b"5\r\nhello\r\nX\r\n") + req(b"GET /evil HTTP/1.1")
        connection.send(world.fill(req(b"GET /good HTTP/1.1") + bad))
        assert connection.answer().status == 200
        assert connection.answer().status == 400
        assert connection.ended() == b""
    assert _targets(world.seen_since(mark)) == ["GET /good"]


@pytest.mark.parametrize(
    "first",
    [
        req(b"GET /last HTTP/1.1", b"Connection: close"),
        req(b"GET /last HTTP/1.1", b"Connection: keep-alive, CLOSE"),
        req(b"GET /last HTTP/1.0"),
        req(b"POST /last HTTP/1.1", b"Connection: close", b"Content-Length: 3", body=b"abc"),
        req(b"POST /last HTTP/1.1", b"Connection: close", _CHUNKED, body=b"0\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_nothing_after_close_is_executed(world: World, first: bytes, together: bool) -> None:
    counted, mark = world.counted(), len(world.recorder.requests)
    with Connection(world.port) as connection:
        evil = req(b"GET /evil HTTP/1.1")
        connection.send(world.fill(first + evil if together else first))
        answer = connection.answer()
        assert answer.status == 200
        assert answer.says_close
        if not together:
            connection.send(world.fill(evil))
        assert connection.ended() == b""
    assert [seen.target for seen in world.seen_since(mark)] == ["/last"]
    assert world.counted() - counted == 1


_WHOLE = {
    "get": req(b"GET /cut?a=b HTTP/1.1", b"X-A: b", b"Accept: */*"),
    "length": req(b"POST /cut HTTP/1.1", b"Content-Length: 11", body=b"hello world"),
    "chunked": req(
        b"POST /cut HTTP/1.1", _CHUNKED,
        body=b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-T: 1\r\n\r\n",
    ),
    "upgrade": req(
        b"POST /cut HTTP/1.1", b"Upgrade: x", b"Connection: upgrade", b"Content-Length: 5",
        body=b"hello",
    ),
    "two": req(b"POST /cut HTTP/1.1", b"Content-Length: 2", body=b"ab") + req(b"GET /cut HTTP/1.1"),
}  # fmt: skip


def _shape(seen: Seen) -> tuple[object, ...]:
    fields = [pair for pair in seen.fields if pair[0] != b"x-request-id"]
    return seen.method, seen.target, fields, seen.body, seen.trailers


@pytest.mark.parametrize("name", list(_WHOLE))
def test_a_request_cut_at_any_byte_is_the_same(world: World, name: str) -> None:
    """All first halves are sent before any second: the gateway has read them by then."""
    raw = world.fill(_WHOLE[name])
    answers = raw.count(b" HTTP/1.1\r\n")
    counted, mark = world.counted(), len(world.recorder.requests)
    connections = [Connection(world.port) for _ in range(1, len(raw))]
    try:
        for at, connection in enumerate(connections, 1):
            connection.send(raw[:at])
        world.seen_since(mark)
        for at, connection in enumerate(connections, 1):
            connection.send(raw[at:])
        for connection in connections:
            for _ in range(answers):
                assert connection.answer().status == 200
    finally:
        for connection in connections:
            connection.sock.close()
    seen = world.seen_since(mark)
    assert len(seen) == answers * len(connections) == world.counted() - counted
    assert len({repr(_shape(one)) for one in seen}) == answers
    assert not world.recorder.strays


def test_a_request_byte_by_byte_is_the_same(world: World) -> None:
    mark = len(world.recorder.requests)
    with Connection(world.port) as connection:
        for byte in world.fill(b"".join(_WHOLE.values())):
            connection.send(bytes((byte,)))
        for _ in range(6):
            assert connection.answer().status == 200
    bodies = [seen.body for seen in world.seen_since(mark)]
    assert bodies == [b"", b"hello world", b"hello world", b"hello", b"ab", b""]


@pytest.mark.parametrize("framing", [b"Content-Length: %d", _CHUNKED])
def test_a_body_that_was_not_asked_for_is_no_request(world: World, framing: bytes) -> None:
    smuggled = world.fill(req(b"GET /evil HTTP/1.1"))
    mark = len(world.recorder.requests)
    framing = framing % len(smuggled) if b"%d" in framing else framing
    head = req(b"POST /echo HTTP/1.1", b"Expect: 100-continue", framing, key=b"tg_live_wrong")
    with Connection(world.port) as connection:
        connection.send(world.fill(head))
        answer = connection.answer()
        assert (answer.status, answer.interim) == (401, [])
        connection.send(smuggled)
        assert connection.ended() == b""
    assert world.seen_since(mark) == []


def test_continue_is_sent_when_the_body_is_wanted(world: World) -> None:
    head = req(b"POST /echo HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 3")
    with Connection(world.port) as connection:
        connection.send(world.fill(head))
        assert connection.line() == b"HTTP/1.1 100 Continue"
        assert connection.line() == b""
        connection.send(b"abc")
        answer = connection.answer()
        assert (answer.status, answer.body[-3:]) == (200, b"abc")
        assert connection.exchange(world.good()).status == 200


def test_http_1_0_is_never_told_to_continue(world: World) -> None:
    raw = req(b"POST /echo HTTP/1.0", b"Expect: 100-continue", b"Content-Length: 3")
    with Connection(world.port) as connection:
        connection.send(world.fill(raw))
        assert connection.silent_for(0.3)
        connection.send(b"abc")
        assert connection.answer().interim == []


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_body_that_is_cut_is_never_complete(
    world: World, size: int, chunked: bool, end: str
) -> None:
    mark = len(world.recorder.requests)
    framing = _CHUNKED if chunked else b"Content-Length: %d" % (size + 1)
    body = b"%x\r\n%b\r\n" % (size, b"x" * size) if chunked else b"x" * size
    connection = Connection(world.port)
    connection.send(world.fill(req(b"POST /cut/%d HTTP/1.1" % size, framing, body=body)))
    if end == "reset":
        connection.reset()
    else:
        connection.half_close()
        with pytest.raises(Cut):
            connection.answer()
        connection.sock.close()
    assert world.seen_since(mark) == []
    # Of a large one the application had begun to read: it sees the end of the connection.
    for stray in world.recorder.strays:
        assert stray.startswith(b"POST /cut/300000 ")
        assert stray.endswith(b"<the end>")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_refusal_can_be_read_while_the_body_is_sent(world: World, chunked: bool) -> None:
    size = 6_000_000
    framing = _CHUNKED if chunked else b"Content-Length: %d" % size
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size) if chunked else b"x" * size
    with Connection(world.port) as connection:
        # All of it, before anything of the answer is read.
        connection.send(req(b"POST /big HTTP/1.1", framing, body=body, key=b"tg_live_wrong"))
        answer = connection.answer()
        assert answer.status == 401
        assert answer.says_close
        assert connection.ended() == b""


def _mutated(raw: bytes, dice: random.Random) -> bytes:
    """With a few bytes changed, lost, doubled, or moved from one place to another."""
    data = bytearray(raw)
    for _ in range(dice.randrange(1, 4)):
        at, other = dice.randrange(len(data)), dice.randrange(len(data))
        what = dice.randrange(5)
        if what == 0:
            data[at] = dice.choice(b"\r\n\t\x00 :;,/#%0123456789aAfF\x7f\x80\xff")
        elif what == 1:
            del data[at : at + dice.randrange(1, 4)]
        elif what == 2:
            data[at:at] = data[at : at + dice.randrange(1, 20)]
        elif what == 3:
            data[at:at] = data[other : other + dice.randrange(1, 40)]
        else:
            data[at:at] = dice.choice((b"\r\n", b"\n", b"\r", b" ", b"0\r\n\r\n", b"chunked"))
        if not data:
            return raw
    return bytes(data)


def test_mutated_requests_are_executed_whole_or_not_at_all(world: World) -> None:
    """Whole and in pieces alike; what is passed on is well-formed, and counted once."""
    dice = random.Random(20)
    originals = [world.fill(raw) for raw in _WHOLE.values()]
    counted, mark = world.counted(), len(world.recorder.requests)
    for _ in range(12):
        connections = []
        for _ in range(40):
            raw = _mutated(dice.choice(originals), dice)
            cut = dice.randrange(len(raw))
            pair = (Connection(world.port), Connection(world.port))
            pair[0].send(raw)
            pair[1].send(raw[:cut])
            connections.append((*pair, raw[cut:]))
        world.seen_since(mark)
        for _, halved, rest in connections:
            halved.send(rest)
        for _ in range(3):  # what is answered at all, mostly is by then
            world.seen_since(mark)
        for whole, halved, _ in connections:
            whole.half_close()
            halved.half_close()
            short, long = sorted((_statuses(whole.ended()), _statuses(halved.ended())), key=len)
            assert long[: len(short)] == short
            whole.sock.close()
            halved.sock.close()
    seen = world.seen_since(mark)
    assert 100 < len(seen) <= world.counted() - counted
    assert not [stray for stray in world.recorder.strays if not stray.endswith(b"<the end>")]


def _statuses(answers: bytes) -> list[bytes]:
    return re.findall(rb"^HTTP/1\.1 (\d\d\d)", answers, re.MULTILINE)


def test_one_request_of_many_connections_at_once_is_counted_once(world: World) -> None:
    counted, mark = world.counted(), len(world.recorder.requests)
    connections = [Connection(world.port) for _ in range(60)]
    for connection in connections:
        connection.send(world.good(path="/many"))
    for connection in connections:
        assert connection.answer().status == 200
        connection.sock.close()
    assert len(world.seen_since(mark)) == world.counted() - counted == 60


def test_the_key_of_one_request_is_not_that_of_the_next(world: World) -> None:
    with Connection(world.port) as connection:
        assert connection.exchange(world.good()).status == 200
        raw = b"GET /after HTTP/1.1\r\nHost: a\r\n\r\n"
        assert connection.exchange(raw).status == 401
        assert ask(world.port, raw).status == 401
    assert KEY != HOST


def test_the_gateway_is_still_whole(world: World) -> None:
    """Nothing of all this left a request in flight, or a word about an unhandled error."""
    wait_until(lambda: world.stack.metric("tallygate_requests_in_flight") == 0)
    assert "Traceback" not in world.stack.gateways[0].output
