"""Sends one request of a row and compares what answered, what the application saw and what counts.

After each, a request of somebody else goes through the same worker: what the gateway was about to
pass on when the answer came has reached the witness by then.
"""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, replace

from tests.hardening.rows import HOST, KEY, VICTIM, Outcome, Path, Refused, Relayed
from tests.support.http1 import Answer, Connection, Cut, ask
from tests.support.recorder import Recorder, Seen
from tests.support.stack import Stack, Subscriber

HOST_NAME = "gateway.example"


class Victim:
    """Listens, and says whether anybody ever connected."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self.visited = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            self._sock.accept()
            self.visited = True
        except OSError:
            pass

    def close(self) -> None:
        self._sock.close()


@dataclass
class World:
    stack: Stack
    recorder: Recorder
    victim: Victim
    subscriber: Subscriber
    other: Subscriber
    sentinel: Connection | None = None

    @property
    def port(self) -> int:
        return self.stack.ports[0]

    def fill(self, raw: bytes) -> bytes:
        """The request with key, host and victim in place."""
        key = self.subscriber.key.encode()
        percent = b"".join(b"%%%02X" % byte for byte in key)
        raw = raw.replace(b"@KEYPERCENT@", percent).replace(KEY, key)
        victim = f"127.0.0.1:{self.victim.port}".encode()
        return raw.replace(HOST, HOST_NAME.encode()).replace(VICTIM, victim)

    def good(self, who: Subscriber | None = None, path: str = "/after") -> bytes:
        key = (who or self.subscriber).key
        return f"GET {path} HTTP/1.1\r\nHost: {HOST_NAME}\r\nX-API-Key: {key}\r\n\r\n".encode()

    def counted(self, meter: str = "requests") -> int:
        use = self.stack.state(self.subscriber).get(meter)
        return int(use.total) if use else 0

    def _sentinel(self) -> Connection:
        if self.sentinel is None:
            self.sentinel = Connection(self.port)
        return self.sentinel

    def seen_since(self, mark: int) -> list[Seen]:
        """What reached the application; a request through the worker makes sure it has."""
        good = self.good(self.other, "/sentinel")
        try:
            answer = self._sentinel().exchange(good)
        except (Cut, OSError):  # it was idle for too long
            self.sentinel = None
            answer = self._sentinel().exchange(good)
        assert answer.status == 200
        if answer.says_close:
            self.sentinel = None
        return [seen for seen in self.recorder.requests[mark:] if seen.target != "/sentinel"]


def play(world: World, raw: bytes, outcome: Outcome, pieces: int = 1) -> None:
    """One request, sent whole or in so many pieces.

    Raises:
        AssertionError: what came of it is not `outcome`.
    """
    raw = world.fill(raw)
    if isinstance(outcome, Path):
        _priced(world, raw, outcome)
        return
    assert isinstance(outcome, Refused | Relayed)
    counted, mark = world.counted(), len(world.recorder.requests)
    with Connection(world.port, deadline_s=8) as connection:
        size = -(-len(raw) // pieces)
        for at in range(0, len(raw), size):
            connection.send(raw[at : at + size])
        if isinstance(outcome, Refused):
            followed = _refused(world, connection, outcome, raw)
        else:
            followed = _relayed(world, connection, outcome, raw)
    seen = [s for s in world.seen_since(mark) if s.target != "/after"]
    count = world.counted() - counted - followed
    assert not world.recorder.strays
    assert not world.victim.visited
    if isinstance(outcome, Refused):
        assert seen == []
        assert count == 0 or (outcome.may_count and count == 1)
        return
    assert len(seen) == count == outcome.times
    for one in seen:
        assert one.target == outcome.target
        if outcome.body is not None:
            assert one.body == outcome.body


def _priced(world: World, raw: bytes, outcome: Path) -> None:
    counted, paid = world.counted(), world.counted("credits")
    mark = len(world.recorder.requests)
    answer = ask(world.port, raw)
    seen = world.seen_since(mark)
    cost = world.counted("credits") - paid
    assert not world.recorder.strays
    assert len(seen) == world.counted() - counted == (answer.status == 200)
    if not seen:
        assert answer.status in (400, 404)
        assert cost == 0
    elif cost != 100:
        assert not outcome.same
        assert seen[0].target == raw.split(b" ")[1].decode("latin-1")


def _refused(world: World, connection: Connection, outcome: Refused, raw: bytes) -> int:
    answer = connection.answer(raw.partition(b" ")[0].decode("latin-1"))
    assert answer.status in outcome.statuses
    if outcome.closed:
        assert connection.ended() == b""
        return 0
    if answer.says_close:
        assert connection.ended() == b""
        return 0
    assert connection.exchange(world.good()).status == 200
    return 1


def _relayed(world: World, connection: Connection, outcome: Relayed, raw: bytes) -> int:
    method = raw.lstrip(b"\r\n").partition(b" ")[0].decode()
    mark = len(world.recorder.requests)
    answer = connection.answer(method)
    assert answer.status == outcome.status
    if outcome.check is not None:
        seen = world.recorder.requests[-1]
        assert len(world.recorder.requests) >= mark
        outcome.check(_masked(seen, world), _masked_answer(answer, world))
    if not outcome.kept:
        assert answer.says_close or connection.ended() == b""
        return 0
    assert connection.exchange(world.good()).status == 200
    return 1


def _masked(seen: Seen, world: World) -> Seen:
    """With placeholders where the request had them, so that a row can name them."""

    def mask(data: bytes) -> bytes:
        return data.replace(world.subscriber.key.encode(), KEY).replace(HOST_NAME.encode(), HOST)

    fields = [(name, mask(value)) for name, value in seen.fields]
    return replace(seen, raw=mask(seen.raw), fields=fields, body=mask(seen.body))


def _masked_answer(answer: Answer, world: World) -> Answer:
    return replace(answer, body=answer.body.replace(HOST_NAME.encode(), HOST))
