"""Micro-batching: checks that arrive in the same event-loop tick leave as one script call.

At most `max_in_flight` calls are under way; what arrives meanwhile waits for the next one, so a
batch grows by itself under load and an idle gateway never waits to fill one. One at a time is the
default: with two, batches are half as large and Redis spends a fifth more CPU per request (measured
at 64 connections, `appendfsync always`). With `appendfsync always` this is group commit: one fsync
makes the whole batch durable before any of its requests goes upstream.

Failure: a call that is not answered within the time-out fails its whole batch, drops the
connection (replies are matched by order) and every check after it fails at once, until a
connection is back. No check ever waits in line for a Redis that does not answer. A call carries the
time until which it is waited for, and the script counts nothing after that: a stalled Redis does
not charge for what was answered 503 when it wakes up. What remains is a call that ran in time and
whose answer was lost: such a batch is handed to `on_unresolved`, which finds out what became of it
from the record that the script leaves, and takes it back.

Each connection knows the run of the server at its other end. The script takes no state that was not
compared with the ledger in that run, so a server that comes back with older data decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from core import clock, ids
from core.admission.program import Program, Verdict
from core.errors import StoreUnavailableError
from core.keyspace import Keyspace
from core.period import calendar_bounds
from core.redis.client import server_run
from core.redis.connection import Connection, RedisReplyError
from core.redis.scripts import Script
from core.telemetry import logs
from gateway.admission.check import Check, Unresolved, grouped

_log = logs.get_logger()

# Reconnection starts soon, since a Redis restart is short, and backs off so that a dead one is not
# hammered by every worker.
_BACKOFF_FIRST_S = 0.02
_BACKOFF_MAX_S = 1.0
_CONNECT_TIMEOUT_S = 1.0
_GRACE_S = 0.002
# More than this many checks in line means that Redis takes fewer than arrive: refuse at once,
# rather than let all of them wait.
_MAX_PENDING = 4_096
# Errors of a server that will not take writes on this connection: it failed over, is loading, lost
# its disk or our rights. Another connection may lead to one that does.
_UNUSABLE = ("READONLY", "LOADING", "MASTERDOWN", "MISCONF", "NOAUTH", "NOPERM", "NOREPLICAS")


@dataclass(slots=True)
class BatchStats:
    """Counters since start; `on_batch(size, seconds)` is called for each answered batch."""

    batches: int = 0
    checks: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def error(self, kind: str) -> None:
        self.errors[kind] = self.errors.get(kind, 0) + 1


class Batcher:
    """Runs checks of one shard through `lua/admit.lua` on one pipelined connection."""

    def __init__(
        self,
        url: str,
        script: Script,
        keyspace: Keyspace,
        *,
        shard: int = 0,
        timeout_s: float = 0.05,
        max_batch: int = 128,
        max_in_flight: int = 1,
        on_batch: Callable[[int, float], None] | None = None,
        on_error: Callable[[str], None] | None = None,
        on_unresolved: Callable[[Unresolved], None] | None = None,
        now_ms: clock.Clock = clock.now_ms,
    ) -> None:
        self._url = url
        self._script = script
        self._keyspace = keyspace
        self._shard = shard
        self._max_in_flight = max_in_flight
        self._new_sender()
        self._number = 0
        self.run = ""  # of the server connected to last
        self._on_unresolved = on_unresolved
        self._timeout_s = timeout_s
        self._timeout_ms = max(1, round(timeout_s * 1000))
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._on_error = on_error
        self._now_ms = now_ms
        self._loop = asyncio.get_running_loop()
        self._pending: list[Check] = []
        self._flush_scheduled = False
        self._in_flight = 0
        self._connection: Connection | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False
        self._calendar: tuple[int, ...] = ()
        self.clock_offset_ms = 0  # Redis time minus ours, as of the last answer
        self.stats = BatchStats()

    def _new_sender(self) -> None:
        """Another record for the batches to come: a lost one must not be written over."""
        self._sender = ids.ulid()
        keyspace, shard = self._keyspace, self._shard
        # One record for each batch that can be under way: they follow each other, so none is
        # written over before its answer is here.
        self._records = [f"{self._sender}:{n}" for n in range(self._max_in_flight)]
        self._shard_keys = [
            (
                keyspace.dirty(shard),
                keyspace.events(shard),
                keyspace.due(shard),
                keyspace.sender(shard, record),
                keyspace.ingested(shard),
            )
            for record in self._records
        ]

    # Life cycle

    async def start(self) -> None:
        """Connects once; when Redis is away, goes on trying in the background."""
        try:
            await self._connect()
        except StoreUnavailableError:
            self._error("connect")
            self._reconnect()

    async def close(self) -> None:
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            with suppress(asyncio.CancelledError):
                await self._reconnecting
        if self._connection is not None:
            self._connection.close()
        self._fail(self._take(len(self._pending)), StoreUnavailableError("shutting down"))

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.closed

    @property
    def connected_run(self) -> str | None:
        """The run of the server connected to; None while there is none."""
        return self.run if self.connected else None

    async def _connect(self) -> None:
        connection = await Connection.open(self._url, _CONNECT_TIMEOUT_S)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await connection.execute("SCRIPT", "LOAD", self._script.source)
                seconds, micros = await connection.execute("TIME")
                role = await _role(connection)
                run = await _run_id(connection)
        except (RedisReplyError, TimeoutError) as error:
            connection.close()
            raise StoreUnavailableError(f"Redis: {error}") from error
        if role == b"slave":
            connection.close()
            raise StoreUnavailableError("Redis: this is a replica, it takes no writes")
        if connection.closed:
            raise StoreUnavailableError("Redis: connection lost")
        self._tell_time(int(seconds) * 1000 + int(micros) // 1000)
        self.run = run
        # Also when nothing is asked: an idle worker that is not ready would never be asked again.
        connection.on_close = self._reconnect
        self._connection = connection

    def _reconnect(self) -> None:
        if self._closed or (self._reconnecting is not None and not self._reconnecting.done()):
            return
        self._reconnecting = self._loop.create_task(self._reconnect_loop())

    async def _reconnect_loop(self) -> None:
        delay = _BACKOFF_FIRST_S
        while not self._closed:
            try:
                await self._connect()
                return
            except StoreUnavailableError:
                self._error("connect")
            await asyncio.sleep(delay)
            delay = min(delay * 2, _BACKOFF_MAX_S)

    def _error(self, kind: str) -> None:
        self.stats.error(kind)
        if self._on_error is not None:
            self._on_error(kind)

    # Checks

    def redis_now_ms(self) -> int:
        """Our best guess of Redis time. It only picks period boundaries; the script decides."""
        return self._now_ms() + self.clock_offset_ms

    def _tell_time(self, redis_ms: int) -> None:
        self.clock_offset_ms = redis_ms - self._now_ms()

    def submit(
        self,
        program: Program,
        keys: tuple[str, ...],
        period_start_ms: int,
        period_end_ms: int,
        lease: str,
        subject: str = "",
    ) -> asyncio.Future[Sequence[int]]:
        """Queues a check. The future gives `[now ms, status, flags, remaining, reset, ...]`.

        It fails with `StoreUnavailableError` when Redis is away or does not answer in time.
        """
        future: asyncio.Future[Sequence[int]] = self._loop.create_future()
        if self._connection is None or self._connection.closed:
            self._reconnect()
            future.set_exception(StoreUnavailableError("Redis is not connected"))
            return future
        if len(self._pending) >= _MAX_PENDING:
            self._error("overload")
            future.set_exception(StoreUnavailableError("Redis takes fewer checks than arrive"))
            return future
        self._pending.append(
            Check(program, keys, period_start_ms, period_end_ms, lease, future, subject)
        )
        if not self._flush_scheduled and self._in_flight < self._max_in_flight:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        return future

    def _take(self, count: int) -> list[Check]:
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def _flush(self) -> None:
        self._flush_scheduled = False
        while self._pending and self._in_flight < self._max_in_flight:
            if len(self._pending) <= self._max_batch:
                batch, self._pending = self._pending, []
            else:
                batch = self._take(self._max_batch)
            self._send(batch)

    def _send(self, batch: list[Check], again: bool = False) -> None:
        connection = self._connection
        if connection is None or connection.closed:
            self._fail(batch, StoreUnavailableError("Redis is not connected"))
            self._reconnect()
            return
        now_ms = self.redis_now_ms()
        calendar = self._calendar
        if not calendar or not calendar[0] <= now_ms < calendar[1]:
            calendar = self._calendar = calendar_bounds(now_ms)
        programs: dict[int, int] = {}
        texts: list[bytes] = []
        self._number += 1
        slot = self._number % self._max_in_flight
        keys: list[str] = [*self._shard_keys[slot]]
        arguments: list[int | str] = []
        groups = grouped(batch)
        for group in groups:
            check = group[0]
            index = programs.get(id(check.program))
            if index is None:
                texts.append(check.program.text)
                index = programs[id(check.program)] = len(texts)
            keys += check.keys
            last = check.lease if check.program.single else len(group)
            arguments += (index, check.period_start_ms, check.period_end_ms, last)
        batch = [check for group in groups for check in group]  # the order of the answers
        started = clock.monotonic()
        self._in_flight += 1
        deadline_ms = now_ms + self._timeout_ms
        sent = Unresolved(self._records[slot], self._number, deadline_ms, tuple(batch))
        reply = connection.execute(
            "EVAL" if again else "EVALSHA",
            self._script.source if again else self._script.sha,
            len(keys),
            *keys,
            len(texts),
            *calendar,
            sent.deadline_ms,
            self.run,
            sent.number,
            *texts,
            *arguments,
        )
        timer = self._loop.call_later(self._timeout_s, self._overdue, connection, reply)
        reply.add_done_callback(lambda done: self._answered(done, sent, started, timer, again))

    def _overdue(self, connection: Connection, reply: asyncio.Future[list[int]]) -> None:
        # When this very loop was held up, the answer lies unread in the socket: timers run before
        # reads. One more turn tells a slow Redis from a slow gateway.
        self._loop.call_later(_GRACE_S, self._timed_out, connection, reply)

    def _timed_out(self, connection: Connection, reply: asyncio.Future[list[int]]) -> None:
        if reply.done():
            return
        self._error("timeout")
        connection.close(f"no answer within {self._timeout_s * 1000:.0f} ms")

    def _answered(
        self,
        reply: asyncio.Future[list[int]],
        sent: Unresolved,
        started: float,
        timer: asyncio.TimerHandle,
        again: bool,
    ) -> None:
        timer.cancel()
        self._in_flight -= 1
        batch = list(sent.checks)
        error = reply.exception()
        if error is not None:
            self._refused(error, sent, again)
        elif reply.result()[1] == Verdict.LATE and not again:
            # We still waited, so it is our idea of Redis time that was wrong. Nothing was counted.
            self._error("clock")
            self._tell_time(reply.result()[0])
            self._send(batch, again=True)
        else:
            numbers = reply.result()
            now_ms = numbers[0]
            self._tell_time(now_ms)
            self.stats.batches += 1
            self.stats.checks += len(batch)
            if self._on_batch is not None:
                self._on_batch(len(batch), clock.monotonic() - started)
            at = 1
            for check in batch:
                status = numbers[at]
                size = check.program.answer_size if status <= Verdict.REJECT else 1
                if not check.future.done():
                    check.future.set_result((now_ms, *numbers[at : at + size]))
                at += size
        if self._pending:
            self._flush()

    def _refused(self, error: BaseException, sent: Unresolved, again: bool) -> None:
        connection = self._connection
        batch = list(sent.checks)
        if isinstance(error, RedisReplyError) and connection is not None:
            if str(error).startswith("NOSCRIPT") and not again:
                # SCRIPT FLUSH, or a restart behind a proxy: run the batch again with the source.
                # Nothing ran, so nothing is counted twice.
                self._error("noscript")
                self._send(batch, again=True)
                return
            self._error("script")
            self._fail(batch, StoreUnavailableError(f"Redis: {error}"))
            if str(error).startswith(_UNUSABLE):
                connection.close(str(error))
            return
        # Before anybody is told: what follows may be the end of this process.
        if sent.sender in self._records:
            self._new_sender()
        try:
            if self._on_unresolved is not None:
                self._on_unresolved(sent)
        except Exception:  # whoever waits has no time-out of its own
            _log.exception("batch_unresolved", sender=sent.sender, number=sent.number)
        self._fail(batch, error)
        if self._pending:
            self._fail(self._take(len(self._pending)), error)
        self._reconnect()

    @staticmethod
    def _fail(batch: list[Check], error: BaseException) -> None:
        for check in batch:
            if not check.future.done():
                check.future.set_exception(error)


async def _role(connection: Connection) -> bytes:
    """`master` or `slave`, empty where the user may not ask."""
    try:
        answer = await connection.execute("ROLE")
    except RedisReplyError:
        return b""
    role: bytes = answer[0]
    return role


async def _run_id(connection: Connection) -> str:
    """Identifies the server process; empty where the user may not ask."""
    try:
        answer = await connection.execute("INFO", "server")
    except RedisReplyError:
        return ""
    return server_run(answer)
