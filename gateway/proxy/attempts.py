"""The tries of one request, where its upstream has a breaker, ejection or retries.

Each try has a verdict, and the client sees one answer: what it is charged is decided by that alone,
once, after the last try. An answer that is tried again was not passed on, not even its head.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from gateway.http.errors import ExchangeError
from gateway.proxy.breaker import State
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.errors import UpstreamClosed
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.retry import IDEMPOTENT
from gateway.proxy.target import Endpoint


class Sender(Protocol):
    """What a try needs of the relay. `error` is why it must end, whatever could be tried."""

    error: ExchangeError | None

    async def connection(
        self, key: bytes, avoid: Collection[Endpoint], fresh: bool = False
    ) -> UpstreamConnection: ...

    async def send(
        self, conn: UpstreamConnection, body: bytes, length: int, per_try_ticks: int
    ) -> UpstreamConnection: ...

    def give_back(self, conn: UpstreamConnection) -> None: ...

    async def pause(self, seconds: float) -> None: ...


async def attempts(
    sender: Sender, pool: UpstreamPool, method: bytes, body: bytes, length: int, key: bytes
) -> UpstreamConnection:
    """A connection with the head of the answer that the client gets.

    Args:
        body: what of the request's body is at hand.
        length: what of it is not, so that it can be sent only once: -1 unknown, 0 nothing.
        key: what the upstream's `balance: {hash: …}` hashes.

    Raises:
        ExchangeError: of the last try.
    """
    judge, retries = pool.judge, pool.retries
    safe = method in IDEMPOTENT and not length
    avoid: set[Endpoint] = set()
    attempt = 0
    if retries is not None:
        retries.request()
    while True:
        attempt += 1
        ticket = judge.admit() if judge is not None else 0
        conn: UpstreamConnection | None = None
        wait = -1.0
        try:
            conn = await sender.connection(key, avoid)
            endpoint = conn.endpoint
            try:
                await sender.send(conn, body, length, pool.per_try_ticks)
            except UpstreamClosed:
                if not stale(conn, safe):
                    raise
                sender.give_back(conn)
                conn = None
                pool.retried_stale()
                conn = await sender.connection(key, avoid, fresh=True)
                endpoint = conn.endpoint
                await sender.send(conn, body, length, pool.per_try_ticks)
        except ExchangeError as error:
            if judge is not None:
                judge.failed(ticket, conn.endpoint if conn is not None else None, error)
            if retries is not None and sender.error is None and not _resting(pool):
                wait = retries.after_error(error, attempt, safe=safe, sent=conn is not None)
            if wait < 0:
                raise
        except BaseException:
            if judge is not None:
                judge.dropped(ticket)
            raise
        else:
            if judge is not None:
                judge.answered(ticket, endpoint, conn.status, conn.complete)
            if retries is not None and conn.status in retries.statuses and not _resting(pool):
                wait = retries.after_status(conn.status, attempt, safe=safe)
            if wait < 0:
                return conn
        if conn is not None:
            avoid.add(conn.endpoint)
            sender.give_back(conn)
        await sender.pause(wait)


def stale(conn: UpstreamConnection, safe: bool) -> bool:
    """A kept connection was closed meanwhile, unanswered, and the request can be sent again."""
    return safe and conn.requests > 1 and not conn.answered


def _resting(pool: UpstreamPool) -> bool:
    """Retries would take the places of the breaker's probes."""
    breaker = pool.judge.breaker if pool.judge is not None else None
    return breaker is not None and breaker.state is not State.CLOSED
