"""The open-loop client, against a server that can be made to stall."""

import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.openloop import Outcome, open_loop, request_of

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    stall_at = -1
    stall_s = 0.0
    served = 0
    lock = threading.Lock()


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        while self.rfile.readline():
            while self.rfile.readline() != b"\r\n":
                pass
            with self.server.lock:  # one at a time: who stalls holds up all others
                self.server.served += 1
                if self.server.served == self.server.stall_at:
                    time.sleep(self.server.stall_s)
            self.wfile.write(_ANSWER[:20])  # in two pieces, as a network may deliver it
            self.wfile.write(_ANSWER[20:])


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _load(server: _Server, *, connections: int) -> Outcome:
    host, port = server.server_address[:2]
    request = request_of(f"http://127.0.0.1:{port}/x?y=1", "a-key")
    return open_loop(
        (str(host), port), [request], rate=200, seconds=1, warm_s=0, connections=connections
    )


def test_every_request_is_sent_and_counted(server: _Server):
    outcome = _load(server, connections=4)

    assert outcome.unanswered == 0
    assert outcome.statuses == {"200": 200}
    assert len(outcome.latencies) == 200 == server.served


def test_a_stall_is_charged_to_every_request_that_was_due_in_it(server: _Server):
    # Given a server that stalls for 0.5 s once, and a client with a single connection, of which a
    # closed loop would see one slow answer in 200
    server.stall_at, server.stall_s = 20, 0.5

    outcome = _load(server, connections=1)

    # Then the hundred requests of that half second were slow: every second one on average by 0.25 s
    slow = [each for each in outcome.latencies if each > 0.1]
    assert len(slow) >= 70
    assert outcome.summary()["p99"] >= 400
    assert outcome.late_sends >= 70


def test_percentiles_are_exact():
    outcome = Outcome(latencies=[number / 1000 for number in range(1, 1001)])

    found = outcome.summary()

    assert found["p50"] == pytest.approx(500)
    assert found["p99"] == pytest.approx(990)
    assert found["p99.9"] == pytest.approx(999)
    assert found["max"] == pytest.approx(1000)


def test_a_server_that_hangs_up_leaves_its_requests_unanswered(server: _Server):
    host, port = server.server_address[:2]
    server.shutdown()
    server.server_close()

    with pytest.raises(OSError, match="refused"):
        open_loop((str(host), port), [b""], rate=1, seconds=1, connections=1)
