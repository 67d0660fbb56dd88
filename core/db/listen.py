"""One LISTEN connection that is always on its way back.

Postgres keeps no notifications for a listener that is away. So `on_connect` runs after each
(re)connection, once LISTEN is in force: whoever caches must then look again at what it holds.
A connection that died without a word is found by a query every `keepalive_s`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import structlog

from core.db.pool import connect_once
from core.errors import TallygateError

_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # a restarted Postgres is back in about a second
_log = structlog.get_logger(__name__)


def _nothing() -> None:
    pass


class Listener:
    """Callbacks run on the event loop and must not block; one that raises is logged.

    `on_notify(payload)`, `on_connect()` after LISTEN is in force, `on_loss()` once per lost
    connection. `connected` tells the present state. Use `start()`, then `await close()`.
    """

    def __init__(
        self,
        url: str,
        channel: str,
        *,
        on_notify: Callable[[str], None],
        on_connect: Callable[[], None] = _nothing,
        on_loss: Callable[[], None] = _nothing,
        timeout_s: float = 2.0,
        keepalive_s: float = 5.0,
    ) -> None:
        self.connected = False
        self._url = url
        self._channel = channel
        self._on_notify = on_notify
        self._on_connect = on_connect
        self._on_loss = on_loss
        self._timeout_s = timeout_s
        self._keepalive_s = keepalive_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin connecting in the background; returns at once."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"listen {self._channel}")

    async def close(self) -> None:
        """Stop listening and close the connection. No callback runs afterwards."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.connected = False

    async def _run(self) -> None:
        attempt = 0
        while True:
            try:
                connection = await connect_once(
                    self._url,
                    purpose="listen",
                    timeout_s=self._timeout_s,
                    command_timeout_s=self._timeout_s,
                )
            except TallygateError as error:
                _log.warning("listen.unreachable", channel=self._channel, error=str(error))
            else:
                if await self._serve(connection):
                    attempt = 0
            # Jitter: all workers lose Postgres at the same moment.
            base = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            await asyncio.sleep(base * random.uniform(0.5, 1.0))  # noqa: S311
            attempt += 1

    async def _serve(self, connection: Any) -> bool:
        """Listen until the connection is lost; whether LISTEN was ever in force."""
        lost = asyncio.Event()
        served = False
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(self._channel, self._notified)
            served = self.connected = True
            self._call(self._on_connect)
            while not lost.is_set() and not connection.is_closed():
                try:
                    async with asyncio.timeout(self._keepalive_s):
                        await lost.wait()
                except TimeoutError:
                    await connection.execute("SELECT 1")
        except asyncio.CancelledError:
            served = False  # closing: no callback any more
            raise
        except Exception as error:  # any failure here means: this connection is of no more use
            _log.warning("listen.failed", channel=self._channel, error=repr(error))
        finally:
            connection.terminate()
            self.connected = False
            if served:
                _log.warning("listen.lost", channel=self._channel)
                self._call(self._on_loss)
        return served

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if self._task is not None:
            self._call(self._on_notify, str(payload))

    def _call(self, callback: Callable[..., None], *args: str) -> None:
        try:
            callback(*args)
        except Exception:
            _log.exception("listen.callback", channel=self._channel)
