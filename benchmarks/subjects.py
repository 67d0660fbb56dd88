"""Subjects as admission leaves them, written to the stores faster than by admitting requests.

Every subject has four limits (GCRA, fixed window, billing quota, daily quota) on two meters.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator
from itertools import islice
from urllib.parse import urlsplit

import asyncpg
import hiredis

from core import clock
from core.keyspace import Keyspace
from core.period import DAY_MS, HOUR_MS, billing_period
from core.policy import FixedWindow, Gcra, Meter, PeriodKind, Plan, Quota
from core.redis.client import server_run

METERS = {"requests": Meter("requests"), "credits": Meter("credits", decimals=2)}
NOW_MS = clock.now_ms()
SPAN = billing_period(0, 1, NOW_MS)
PLAN = Plan(
    "bench",
    (
        Gcra("per_second", "requests", 1_000_000, 1_000_000, 1_000_000),
        FixedWindow("per_day", "requests", 10**10, DAY_MS),
        Quota("monthly", "requests", 10**10, PeriodKind.BILLING),
        Quota("daily", "credits", 10**10, PeriodKind.DAY),
    ),
)
COSTS = {"requests": 1, "credits": 25}
_HOUR_MS = NOW_MS - NOW_MS % HOUR_MS
_CHUNK = 2_000


def names(count: int) -> list[str]:
    """Ids as long as real ones: sub_ and 26 characters."""
    return [f"sub_{number:026d}" for number in range(count)]


def _meters(version: int) -> dict[str, str]:
    """The fields that each admitted request changes and the ledger is told of."""
    return {
        "ver": str(version),
        "m:requests": f"{version} 0 {version} 0 {version}",
        "m:credits": f"{version * 25} 0 {version * 25} 0 {version}",
    }


def state(version: int, run: str) -> dict[str, str]:
    """All fields of a subject after `version` requests, verified in a server's run."""
    bounds = f"{SPAN[0]} {SPAN[1]} {_HOUR_MS}"
    return _meters(version) | {
        "epoch": "1",
        "run": run,
        "p:requests": bounds,
        "p:credits": bounds,
        "r:per_second": f"{NOW_MS * 1000 + 77} 1000000 1000000",
        "w:per_day": f"{NOW_MS - NOW_MS % DAY_MS} {version}",
        "q:credits:day": f"{NOW_MS - NOW_MS % DAY_MS} {version * 25} {version}",
        "t:monthly": f"{SPAN[0]} 80 10000000000",
    }


class Pipe:
    """A blocking connection that sends packed commands in bulk and checks that none failed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 6379))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        if parts.password:
            self.send([("AUTH", parts.password)])

    def send(self, commands: Iterable[tuple[object, ...]]) -> list[object]:
        """Runs all commands; their replies."""
        replies: list[object] = []
        stream = iter(commands)
        while chunk := list(islice(stream, _CHUNK)):
            packed = [hiredis.pack_command(c) for c in chunk]  # type: ignore[arg-type]
            self._socket.sendall(b"".join(packed))
            wanted = len(replies) + len(chunk)
            while len(replies) < wanted:
                reply = self._reader.gets()
                if reply is False:
                    self._reader.feed(self._socket.recv(1 << 20))
                    continue
                if isinstance(reply, Exception):
                    raise reply
                replies.append(reply)
        return replies

    def close(self) -> None:
        self._socket.close()


def _flat(fields: dict[str, str]) -> list[str]:
    return [word for pair in fields.items() for word in pair]


def write_states(pipe: Pipe, subjects: Iterable[str], version: int) -> None:
    """Whole states, not listed as changed."""
    info = pipe.send([("INFO", "server")])[0]
    assert isinstance(info, bytes)
    key, fields = Keyspace().state, _flat(state(version, server_run(info)))
    pipe.send(("HSET", key(subject), *fields) for subject in subjects)


def change(pipe: Pipe, subjects: list[str], version: int) -> None:
    """What one admitted request each leaves behind."""
    keyspace, fields, now_ms = Keyspace(), _flat(_meters(version)), clock.now_ms()
    dirty = keyspace.dirty(0)

    def commands() -> Iterator[tuple[object, ...]]:
        for at in range(0, len(subjects), 100):
            keys = [keyspace.state(subject) for subject in subjects[at : at + 100]]
            for key in keys:
                yield ("HSET", key, *fields)
            yield ("ZADD", dirty, "NX", *(word for key in keys for word in (now_ms, key)))

    pipe.send(commands())


async def write_ledger(url: str, subjects: list[str], version: int) -> None:
    """The same in Postgres, by COPY."""
    first, end = map(clock.to_datetime, SPAN)
    hour = clock.to_datetime(_HOUR_MS)
    totals = [("requests", METERS["requests"].from_units(version))]
    totals.append(("credits", METERS["credits"].from_units(version * 25)))
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SELECT tallygate_add_hours_partition($1)", hour)
        copies = (
            ("ledger_subjects", "subject epoch version",
             ((s, 1, version) for s in subjects)),
            ("ledger_periods", "subject meter period_start period_end total epoch version",
             ((s, m, first, end, total, 1, version) for s in subjects for m, total in totals)),
            ("ledger_hours", "subject meter period_start hour_start total overage epoch version",
             ((s, m, first, hour, total, 0, 1, version) for s in subjects for m, total in totals)),
        )  # fmt: skip
        for table, columns, rows in copies:
            await connection.copy_records_to_table(table, records=rows, columns=columns.split())
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def load(redis_url: str, postgres_url: str, count: int, version: int = 1) -> list[str]:
    """`count` subjects in both stores, clean; their names."""
    subjects = names(count)
    pipe = Pipe(redis_url)
    write_states(pipe, subjects, version)
    pipe.close()
    asyncio.run(write_ledger(postgres_url, subjects, version))
    return subjects
