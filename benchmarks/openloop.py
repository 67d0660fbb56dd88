"""An open-loop HTTP/1.1 client: requests at a fixed rate, whatever the server does.

    python -m benchmarks.openloop --url http://127.0.0.1:8080/path --key KEY --rate 2000

Request number i is due at start + i / rate. Its latency counts from then to the last byte of its
answer, also when it had to wait for a free connection: a server that stalls for a second is charged
for every request that was due in that second, where a closed loop would have counted one (what is
called coordinated omission). Percentiles are exact: all latencies are kept and sorted.

It waits with select(), which is exact to some 0.1 ms, where an event loop's timers are to 1 ms.
Plain HTTP, answers with a Content-Length. Prints one line of JSON; milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_RECV = 1 << 17
_LAST_S = 10.0  # for the answers that are still out when the last request has been sent
PERCENTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}


@dataclass
class Outcome:
    """Latencies in seconds; `unanswered` were sent or due, and had no answer at the end."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    late_sends: int = 0  # sent more than 1 ms after they were due: for want of a connection or CPU

    def summary(self) -> dict[str, float]:
        """Percentiles and the longest, in milliseconds."""
        ranked = sorted(self.latencies) or [math.nan]
        found = {
            name: ranked[min(len(ranked) - 1, math.ceil(len(ranked) * share) - 1)] * 1000
            for name, share in PERCENTILES.items()
        }
        return found | {"max": ranked[-1] * 1000}


@dataclass
class _Connection:
    socket: socket.socket
    due: float = 0.0
    received: bytes = b""
    missing: int = -1  # bytes of the body still to come; -1 before the head is complete
    status: str = ""


def request_of(url: str, key: str = "") -> bytes:
    """A GET of the URL, with the key in the Authorization field."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", "Accept: */*"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def open_loop(
    address: tuple[str, int],
    requests: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    warm_s: float = 0.5,
    connections: int = 64,
) -> Outcome:
    """Sends `requests` in turn at `rate` a second; what was due in the first `warm_s` is dropped.

    Raises:
        OSError: no connection could be made.
    """
    outcome, epoll, by_fd = Outcome(), select.epoll(), dict[int, _Connection]()
    for _ in range(connections):
        opened = socket.create_connection(address, timeout=5)
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        by_fd[opened.fileno()] = _Connection(opened)
        epoll.register(opened, select.EPOLLIN)
    idle = deque(by_fd.values())
    gc.disable()
    try:
        _drive(outcome, epoll, by_fd, idle, requests, rate, warm_s, seconds)
    finally:
        gc.enable()
        for each in by_fd.values():
            each.socket.close()
        epoll.close()
    return outcome


def _drive(
    outcome: Outcome,
    epoll: select.epoll,
    by_fd: dict[int, _Connection],
    idle: deque[_Connection],
    requests: Sequence[bytes],
    rate: float,
    warm_s: float,
    seconds: float,
) -> None:
    clock = time.perf_counter
    total, sent, answered = round(rate * (warm_s + seconds)), 0, 0
    start = clock() + 0.01
    counted_from, give_up = start + warm_s, start + warm_s + seconds + _LAST_S
    while answered < total and by_fd:
        now = clock()
        if now > give_up:
            break
        while idle and sent < total and now >= (due := start + sent / rate):
            connection = idle.popleft()
            connection.due = due
            if now - due > 0.001 and due >= counted_from:
                outcome.late_sends += 1
            connection.socket.send(requests[sent % len(requests)])
            sent += 1
            now = clock()
        wait = start + sent / rate - now if idle and sent < total else 0.1
        ready = select.select([epoll], [], [], max(wait, 0))[0]
        for fd, _ in epoll.poll(0) if ready else ():
            connection = by_fd[fd]
            try:
                data = connection.socket.recv(_RECV)
            except OSError:
                data = b""
            if not data:  # the server closed it: the request is lost
                epoll.unregister(fd)
                del by_fd[fd]
                if connection in idle:
                    idle.remove(connection)
                connection.socket.close()
                continue
            if _complete(connection, data):
                answered += 1
                if connection.due >= counted_from:
                    outcome.latencies.append(clock() - connection.due)
                    outcome.statuses[connection.status] += 1
                idle.append(connection)
    outcome.unanswered = total - answered


def _complete(connection: _Connection, data: bytes) -> bool:
    if connection.missing < 0:
        data = connection.received + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            connection.received = data
            return False
        head = data[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            raise ValueError(f"an answer without Content-Length: {head.decode('latin-1')}")
        length = head[at + 17 :].split(b"\r\n", 1)[0]
        connection.status = data[9:12].decode()
        connection.received = b""
        connection.missing = int(length) + end + 4
    connection.missing -= len(data)
    if connection.missing > 0:
        return False
    connection.missing = -1
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.openloop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", action="append", default=[], help="several are used in turn")
    parser.add_argument("--keys-file", type=argparse.FileType(), help="one key a line")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    keys = options.key + (options.keys_file.read().split() if options.keys_file else [])
    parts = urlsplit(options.url)
    outcome = open_loop(
        (parts.hostname or "127.0.0.1", parts.port or 80),
        [request_of(options.url, key) for key in keys or [""]],
        rate=options.rate,
        seconds=options.seconds,
        connections=options.connections,
    )
    counts = {
        "answered": len(outcome.latencies),
        "unanswered": outcome.unanswered,
        "late_sends": outcome.late_sends,
        "statuses": outcome.statuses,
    }
    print(json.dumps(counts | outcome.summary()))


if __name__ == "__main__":
    main()
