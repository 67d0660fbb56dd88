"""What a connection makes of answers that are nearly right."""

from __future__ import annotations

import asyncio

from core.policy import Upstream
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.pool import UpstreamPool

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2 \r\n\r\nok"


class Sink(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def abort(self) -> None: ...


def answered() -> UpstreamConnection:
    async def run() -> UpstreamConnection:
        pool = UpstreamPool(Upstream(name="u", urls=("http://127.0.0.1:9000",)))
        loop = asyncio.get_running_loop()
        conn = UpstreamConnection(pool.endpoints[0], loop, lambda _: None)
        conn.connection_made(Sink())
        conn.begin(b"GET / HTTP/1.1\r\n\r\n", False)
        conn.data_received(ANSWER)
        return conn

    return asyncio.run(run())


def test_white_space_around_a_length_is_none_of_it() -> None:
    conn = answered()
    assert (conn.error, conn.complete, conn.length, conn.reusable) == (None, True, 2, True)


def test_a_connection_that_was_closed_behind_its_answer_serves_nobody_else() -> None:
    conn = answered()
    conn.eof_received()
    assert conn.complete
    assert not conn.reusable
