"""Asks Postgres for keys the cache does not hold, and keeps the cache true.

One task sends one query at a time; whatever is asked meanwhile (misses of many requests, stale
keys, changed subscriptions) goes into the next. That is the micro-batching and, as a digest
is in the queue once, the single flight.

Changes. Triggers notify after commit, so a query sent after a notification sees the change. What
was asked *before* may come back *after* the notification with the old row: rows touched by a
notification while the query was on its way are thrown away and asked again. After each
(re)connection of LISTEN, notifications may have been lost: every cached key is looked up again, in
batches, and stays usable meanwhile.

Failures. A query that fails answers its waiters with StoreUnavailableError; everything that only
refreshes stays queued and is tried again with backoff. Cached keys are not affected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import structlog

from core.clock import Clock
from core.db import Database, Listener
from core.directory import KeyRow, lookup_keys, lookup_subscriptions
from core.errors import StoreUnavailableError
from gateway.auth.keycache import KeyCache, KeyEntry

CHANNEL = "tallygate_changed"
# Keeps what one answer costs this loop to a millisecond or so; sweeping 100,000 keys took about as
# long with 500.
_BATCH = 200
_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # a restarted Postgres is back in about a second

_log = structlog.get_logger(__name__)


class KeyLoader:
    """`start()`, then `load` and `refresh`; `await close()` at the end.

    `url` is for the LISTEN connection, `database` (whose time-outs hold) for the queries.
    `timeout_s` is how long a request waits for a look-up. `listening` tells whether changes arrive
    at present.
    """

    def __init__(
        self,
        database: Database,
        url: str,
        cache: KeyCache,
        *,
        clock: Clock,
        timeout_s: float = 2.0,
        keepalive_s: float = 5.0,
    ) -> None:
        self._database = database
        self._cache = cache
        self._clock = clock
        self._timeout_s = timeout_s
        self._listener = Listener(
            url,
            CHANNEL,
            on_notify=self._on_notify,
            on_connect=self._on_connect,
            timeout_s=timeout_s,
            keepalive_s=keepalive_s,
        )
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._missing: dict[bytes, asyncio.Future[KeyEntry | None]] = {}
        self._stale: set[bytes] = set()
        self._changed: set[str] = set()  # subscription ids
        self._sweep: list[bytes] = []
        # What notifications named while a query was on its way; collected only then.
        self._in_flight = False
        self._touched_keys: set[bytes] = set()
        self._touched_subscriptions: set[str] = set()
        self._generation = 0  # of "everything may have changed"

    @property
    def listening(self) -> bool:
        return self._listener.connected

    @property
    def pending(self) -> int:
        """Look-ups that wait to be sent: 0 when the cache is as true as it can be."""
        return len(self._missing) + len(self._stale) + len(self._changed) + len(self._sweep)

    def start(self) -> None:
        """Begin to listen and to answer; needs a running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="key loader")
            self._listener.start()

    async def close(self) -> None:
        """Stop; whoever still waits gets StoreUnavailableError."""
        await self._listener.close()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._fail(list(self._missing), StoreUnavailableError("the gateway is stopping"))

    async def load(self, digest: bytes) -> KeyEntry | None:
        """The entry of `digest`, from Postgres; None when there is no such key.

        Raises:
            StoreUnavailableError: Postgres did not answer in time.
        """
        future = self._missing.get(digest)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._missing[digest] = future
            self._wake.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                # Shielded: a caller that goes away must not cancel it for the others.
                return await asyncio.shield(future)
        except TimeoutError:
            raise StoreUnavailableError("Postgres did not answer a key look-up in time") from None

    def refresh(self, digest: bytes) -> None:
        """Look up a cached key again, in the background. Cheap to call on each request."""
        if digest not in self._stale:
            self._stale.add(digest)
            self._wake.set()

    # --- changes ---------------------------------------------------------------------------

    def _on_notify(self, payload: str) -> None:
        kind, _, name = payload.partition(":")
        if kind == "key":
            try:
                digest = bytes.fromhex(name)
            except ValueError:
                _log.warning("keys.notification", payload=payload[:100])
                return
            # Dropped, not refreshed: if Postgres goes away now, a revoked key must not live on.
            self._cache.drop(digest)
            if self._in_flight:
                self._touched_keys.add(digest)
        elif kind == "subscription":
            if self._in_flight:
                self._touched_subscriptions.add(name)
            if self._cache.has_subscription(name):
                self._changed.add(name)
                self._wake.set()
        else:
            self._on_connect()

    def _on_connect(self) -> None:
        """Anything may have changed unheard."""
        self._generation += 1
        self._cache.drop_negatives()
        self._sweep = self._cache.digests()
        self._wake.set()

    # --- the task --------------------------------------------------------------------------

    async def _run(self) -> None:
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._round()
                failures = 0
            except StoreUnavailableError as error:
                if failures == 0:
                    _log.warning("keys.unavailable", error=str(error))
                failures += 1
            except Exception as error:  # a bug, a schema that does not fit: must not end the task
                _log.exception("keys.failed")
                reason = f"the key look-up failed: {error!r}"
                self._fail(list(self._missing), StoreUnavailableError(reason))
                failures += 1
            if failures:
                await self._pause(_RETRY_S[min(failures, len(_RETRY_S)) - 1])
            if self.pending:
                self._wake.set()

    async def _pause(self, seconds: float) -> None:
        """Wait before background work is tried again; a new miss cuts it short."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self._missing and (left := deadline - asyncio.get_running_loop().time()) > 0:
            self._wake.clear()
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _round(self) -> None:
        """Send what is queued, at most one batch of each kind: keys first, then subscriptions."""
        if self._missing or self._stale or self._sweep:
            await self._look_up_keys()
        if self._changed:
            await self._look_up_subscriptions()

    async def _look_up_keys(self) -> None:
        waiting = list(islice(self._missing, _BATCH))
        asked = set(waiting)
        stale = list(islice(self._stale, _BATCH - len(asked)))
        asked.update(stale)
        swept = self._sweep[-(_BATCH - len(asked)) :] if len(asked) < _BATCH else []
        asked.update(swept)
        generation = self._generation
        try:
            with self._watching():
                rows = await lookup_keys(self._database, list(asked))
        except StoreUnavailableError as error:
            self._fail(waiting, error)
            raise
        self._stale.difference_update(stale)
        if swept and generation == self._generation:
            del self._sweep[-len(swept) :]
        self._take_in(asked, {row.digest: row for row in rows}, generation)

    def _take_in(self, asked: set[bytes], rows: dict[bytes, KeyRow], generation: int) -> None:
        now_ms = self._clock()
        for digest in asked:
            row = rows.get(digest)
            if digest in self._touched_keys:
                continue  # already dropped; whoever waits for it stays queued
            if row is not None and row.subscription.id in self._touched_subscriptions:
                if digest in self._cache:
                    self._stale.add(digest)
                continue  # asked again
            entry = None
            if row is None:
                self._cache.store_negative(digest, now_ms)
            elif digest in self._missing or digest in self._cache:
                entry = self._cache.store(row, now_ms)
            if generation != self._generation:
                # LISTEN came back meanwhile: this answer may be older than a lost notification.
                if entry is None:
                    self._cache.drop(digest)
                else:
                    self._sweep.append(digest)
            future = self._missing.pop(digest, None)
            if future is not None and not future.done():
                future.set_result(entry)

    async def _look_up_subscriptions(self) -> None:
        asked = list(islice(self._changed, _BATCH))
        with self._watching():
            rows = await lookup_subscriptions(self._database, asked)
        found = {row.id: row for row in rows}
        for subscription_id in asked:
            if subscription_id in self._touched_subscriptions:
                continue  # changed again meanwhile: stays queued
            self._changed.discard(subscription_id)
            if subscription_id in found:
                self._cache.update_subscription(found[subscription_id])
            else:
                self._cache.drop_subscription(subscription_id)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While a query is on its way, note what notifications name: it may answer with older."""
        self._touched_keys.clear()
        self._touched_subscriptions.clear()
        self._in_flight = True
        try:
            yield
        finally:
            self._in_flight = False

    def _fail(self, digests: list[bytes], error: StoreUnavailableError) -> None:
        for digest in digests:
            future = self._missing.pop(digest, None)
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # read: nobody may be left to wait for it
