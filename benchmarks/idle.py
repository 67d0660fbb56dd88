"""Memory of idle keep-alive connections: `python -m benchmarks.idle --connections 5000`.

A gateway of its own, warm; then as many connections as asked for, each of which has had one answer
and stays open. What one takes is the rise of resident memory from a fifth of them to all of them:
the first ones live in memory that was free already. They are closed and opened again, to see that
the memory is used again.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import time

from benchmarks.openloop import request_of
from benchmarks.processes import rss_mib
from benchmarks.stack import Stack, running

_OWN = 500  # descriptors for anything else
_SETTLE_S = 1.0


def idle(stack: Stack, connections: int = 5000) -> dict[str, float]:
    """KiB of resident memory for each idle connection, the first time and when opened again."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the gateway inherits it
    connections = min(connections, hard - _OWN)
    port, (pid,) = stack.start_gateway()
    url = f"http://127.0.0.1:{port}/1k"
    request = request_of(url, stack.keys["four_limits"][0])
    for _ in range(5):
        _close(_open(port, request, 100))
    before = _settled(pid)
    found = []
    for _ in range(2):
        opened = _open(port, request, connections // 5)
        few = _settled(pid)
        opened += _open(port, request, connections - len(opened))
        found.append((_settled(pid) - few) * 1024 / (connections - connections // 5))
        _check(opened)
        _close(opened)
    return {
        "connections": connections,
        "kib": found[0],
        "kib_again": found[1],
        "rss_mib_before": before,
        "rss_mib_after": _settled(pid),
    }


def _settled(pid: int) -> float:
    time.sleep(_SETTLE_S)
    return rss_mib(pid)


def _check(connections: list[socket.socket]) -> None:
    """That none was closed meanwhile.

    Raises:
        RuntimeError: some were.
    """
    closed = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            closed += connection.recv(1) == b""
        except BlockingIOError:
            continue
    if closed:
        raise RuntimeError(f"{closed} of {len(connections)} idle connections were closed")


def _open(port: int, request: bytes, count: int) -> list[socket.socket]:
    opened = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(request)
        answer = connection.recv(1 << 16)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"unexpected answer: {answer[:200]!r}")
        opened.append(connection)
    return opened


def _close(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.idle", description=__doc__)
    parser.add_argument("--connections", type=int, default=5000)
    options = parser.parse_args()
    with running(appendfsync="everysec", subscriptions=1) as stack:
        print(json.dumps(idle(stack, options.connections)))


if __name__ == "__main__":
    main()
