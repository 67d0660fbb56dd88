"""Many small replies at once: what redis-py spends on each reply is more than Redis does.

For reads of thousands of hashes; everything else goes through redis-py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from core.errors import StoreUnavailableError
from core.redis.connection import Connection, RedisReplyError

# Commands sent before the answers to them are awaited: bounds what the server buffers for us.
_SLICE = 1_000


def is_one_server(url: str) -> bool:
    """Whether the URL is of one server, and not of a cluster or of sentinels."""
    return "+" not in url.partition("://")[0]


class BulkReader:
    """Pipelined commands on a connection of its own, which opens when it is first used."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()

    async def run(self, command: str, keys: Sequence[str]) -> list[Any]:
        """`command key` for each key; replies in order, strings as bytes.

        Raises:
            StoreUnavailableError: no connection, an error for an answer, or none in time. Nothing
                is left on the connection then.
        """
        replies: list[Any] = []
        async with self._lock:
            connection = await self._open()
            for first in range(0, len(keys), _SLICE):
                waiting = connection.execute_many(
                    [(command, key) for key in keys[first : first + _SLICE]]
                )
                try:
                    async with asyncio.timeout(self._timeout_s):
                        replies += await waiting
                except RedisReplyError as error:
                    raise StoreUnavailableError(f"Redis: {error}") from error
                except TimeoutError:
                    connection.close("no answer in time")
                    raise
                except asyncio.CancelledError:
                    connection.close("nobody waits any more")
                    raise
        return replies

    async def _open(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = await Connection.open(self._url, self._timeout_s)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
