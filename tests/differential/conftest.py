"""httpbin in gunicorn, and a whole gateway in front of it: started once, used by every shape."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.differential.differences import KEY_FIELD, Comparison
from tests.differential.shapes import Shape
from tests.support.http1 import Answer, Connection, ask
from tests.support.processes import Process
from tests.support.servers import NewDatabase, server_directory
from tests.support.stack import Stack, Subscriber, start_stack
from tests.support.wait import free_port

_CONFIG = """
gateway: {drain: 1s}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 5s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
log: {format: json, level: warning}
upstreams:
  httpbin: {urls: ["http://127.0.0.1:%d"], timeout: {connect: 10s}}
routes:
  - {match: {path: /*}, upstream: httpbin, encoded_slash: allow}
plans:
  all:
    limits: {year: {period: billing, limit: 100_000}}
"""


@dataclass
class Pair:
    """Both ways to httpbin. The gateway's is one connection as long as that is kept."""

    stack: Stack
    subscriber: Subscriber
    direct_port: int
    comparison: Comparison
    asked: int = 0
    connection: Connection | None = None
    opened: int = 0

    def direct(self, shape: Shape) -> Answer:
        host = ("Host", f"127.0.0.1:{self.direct_port}".encode())
        return ask(self.direct_port, shape.raw(host), shape.method)

    def through(self, shape: Shape) -> Answer:
        host = ("Host", self.host.encode())
        key = (KEY_FIELD, self.subscriber.key.encode())
        if self.connection is None:
            self.connection = Connection(self.stack.ports[0])
            self.opened += 1
        self.asked += 1
        answer = self.connection.exchange(shape.raw(host, key), shape.method)
        if answer.says_close:
            self.close()
        return answer

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.stack.ports[0]}"

    def close(self) -> None:
        if self.connection is not None:
            self.connection.sock.close()
            self.connection = None

    def check(self, shape: Shape) -> None:
        """Both answers must be alike."""
        direct = self.direct(shape)
        try:
            through = self.through(shape)
        except BaseException:
            self.close()
            raise
        self.comparison.compare(shape, direct, through)


@pytest.fixture(scope="module")
def pair(new_database: NewDatabase) -> Iterator[Pair]:
    port = free_port()
    gunicorn = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "8"]
    gunicorn += ["--bind", f"127.0.0.1:{port}", "--keep-alive", "60", "--log-level", "warning"]
    gunicorn += ["--limit-request-line", "8190", "--limit-request-field_size", "16000"]
    with (
        server_directory() as path,
        Process([*gunicorn, "httpbin:app"]) as httpbin,
        start_stack(path, _CONFIG % port, new_database(), reconcilers=0) as stack,
    ):
        httpbin.wait_for_http(f"http://127.0.0.1:{port}/get")
        comparison = Comparison(f"127.0.0.1:{port}", f"127.0.0.1:{stack.ports[0]}")
        pair = Pair(stack, stack.subscribe("all"), port, comparison)
        yield pair
        pair.close()
