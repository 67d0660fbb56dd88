"""A closed-loop HTTP/1.1 load client: N connections, each with one request under way.

Prints one JSON line: requests, seconds, statuses, latency percentiles in microseconds. The latency
is of each request from its write to the last byte of its answer. A closed loop slows down with the
server, so its percentiles are those of a server at full load, not of a fixed rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import cast

import uvloop


class Connection(asyncio.Protocol):
    def __init__(self, requests: list[bytes], stop_at: float, latencies: list[float]) -> None:
        self._requests = requests
        self._next = 0
        self._stop_at = stop_at
        self._latencies = latencies
        self._buffer = b""
        self._sent = 0.0
        self.statuses: Counter[str] = Counter()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._next = (self._next + 1) % len(self._requests)
        self._sent = time.perf_counter()
        self._transport.write(self._requests[self._next])

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = buffer
            return
        start = buffer.find(b"content-length: ") + 16
        length = int(buffer[start : buffer.index(b"\r\n", start)])
        if len(buffer) < end + 4 + length:
            self._buffer = buffer
            return
        self._buffer = b""
        now = time.perf_counter()
        self._latencies.append(now - self._sent)
        self.statuses[buffer[9:12].decode()] += 1
        if now >= self._stop_at:
            self._transport.close()
            self._finish()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.statuses["lost"] += 1
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def _run(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    keys = options.keys.split(",") if options.keys else [""]
    requests = [
        (
            f"GET {options.path} HTTP/1.1\r\nhost: bench.test\r\nuser-agent: bench\r\n"
            "accept: */*\r\n" + (f"authorization: Bearer {key}\r\n" if key else "") + "\r\n"
        ).encode()
        for key in keys
    ]
    latencies: list[float] = []
    started = time.perf_counter()
    stop_at = started + options.seconds
    connections = []
    for number in range(options.connections):
        turned = requests[number % len(requests) :] + requests[: number % len(requests)]
        _, connection = await loop.create_connection(
            lambda mine=turned: Connection(mine, stop_at, latencies),  # type: ignore[misc]
            "127.0.0.1",
            options.port,
        )
        connections.append(connection)
    await asyncio.gather(*(connection.done for connection in connections))
    seconds = time.perf_counter() - started
    statuses: Counter[str] = Counter()
    for connection in connections:
        statuses += connection.statuses
    latencies.sort()

    def percentile(share: float) -> int:
        return round(latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1e6)

    print(
        json.dumps(
            {
                "requests": len(latencies),
                "seconds": seconds,
                "statuses": statuses,
                "p50_us": percentile(0.5),
                "p90_us": percentile(0.9),
                "p99_us": percentile(0.99),
                "p999_us": percentile(0.999),
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/")
    parser.add_argument("--keys", default="")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    uvloop.run(_run(parser.parse_args()))
