"""What Postgres is set to, and what that would lose."""

from __future__ import annotations

from collections.abc import Iterator

from core.db import Database, Row
from core.db.migrate import load_migrations
from core.doctor.findings import Crash, Finding, Severity, ok

_NEARLY_ALL_PERCENT = 90
_RELOAD = "then SELECT pg_reload_conf()"
_ACKNOWLEDGED = "hours, periods and usage events that Redis dropped because they were committed"


async def schema(database: Database) -> Finding:
    """Whether the tables are those of this version.

    Raises:
        StoreUnavailableError: Postgres did not answer.
    """
    files = load_migrations()
    rows = []
    if await database.fetchval("has_migrations"):
        rows = await database.fetch("read_migrations")
    newest = max((int(row["version"]) for row in rows), default=0)
    if newest > len(files):
        return Finding(
            "postgres.schema",
            Severity.CRITICAL,
            f"the database is at {newest:04d}, newer than this version's {files[-1].label}",
            {},
            "install the newer version of tallygate again",
        )
    if newest < len(files):
        have = f"{newest:04d}" if newest else "empty"
        return Finding(
            "postgres.schema",
            Severity.CRITICAL,
            f"the database is {have} and this version needs {files[-1].label}: what it writes "
            "would be refused, so counts wait in Redis",
            {},
            "tallygate migrate",
        )
    return ok("postgres.schema", f"the schema is up to date: {files[-1].label}")


async def examine(database: Database, connections: int) -> list[Finding]:
    """Findings about the server; `connections` is what this deployment may open.

    Raises:
        StoreUnavailableError: Postgres did not answer.
    """
    row = await database.fetchrow("doctor_settings")
    assert row is not None
    return [
        ok("postgres.version", f"Postgres {row['version']}"),
        *_writable(row),
        *_durable(row),
        _standbys(row),
        _connections(row, connections),
        await schema(database),
    ]


def _writable(row: Row) -> Iterator[Finding]:
    if row["standby"]:
        yield Finding(
            "postgres.standby",
            Severity.CRITICAL,
            "this is a standby: it takes no writes, so nothing reaches the ledger and cold "
            "subjects are answered 503",
            {},
            "point postgres.url to the primary, or add target_session_attrs=read-write to it",
        )
    elif row["read_only"] == "on":
        yield Finding(
            "postgres.default_transaction_read_only",
            Severity.CRITICAL,
            "default_transaction_read_only on: nothing reaches the ledger and cold subjects are "
            "answered 503",
            {},
            f"ALTER SYSTEM SET default_transaction_read_only = off, {_RELOAD}; look also at ALTER "
            "ROLE and ALTER DATABASE settings (\\drds)",
        )


def _durable(row: Row) -> Iterator[Finding]:
    if row["fsync"] == "on":
        yield ok("postgres.fsync", "fsync on")
    else:
        yield Finding(
            "postgres.fsync",
            Severity.CRITICAL,
            "fsync off: a commit may never reach the disk, and data files may be torn",
            {Crash.POWER: "the whole database may be unreadable: customers, keys and ledger"},
            f"ALTER SYSTEM SET fsync = on, {_RELOAD}",
        )
    commit = row["synchronous_commit"]
    if commit == "off":
        yield Finding(
            "postgres.synchronous_commit",
            Severity.CRITICAL,
            "synchronous_commit off: a commit is answered before it is on disk",
            {
                Crash.PROCESS: f"the commits of about the last 0.6 s: {_ACKNOWLEDGED}",
                Crash.POWER: "the same",
            },
            f"ALTER SYSTEM SET synchronous_commit = on, {_RELOAD}; look also at ALTER ROLE and "
            "ALTER DATABASE settings (\\drds)",
        )
    else:
        yield ok("postgres.synchronous_commit", f"synchronous_commit {commit}")
    if row["full_page_writes"] == "on":
        yield ok("postgres.full_page_writes", "full_page_writes on")
    else:
        yield Finding(
            "postgres.full_page_writes",
            Severity.WARNING,
            "full_page_writes off: a page that was half written is not restored",
            {Crash.POWER: "pages of the ledger, unless the file system never tears a page (ZFS)"},
            f"ALTER SYSTEM SET full_page_writes = on, {_RELOAD}",
        )
    if row["data_checksums"] != "on":
        yield Finding(
            "postgres.data_checksums",
            Severity.NOTE,
            "data_checksums off: a disk that returns other data than was written is not noticed",
            {},
            "stop the server, pg_checksums --enable, start it",
        )


def _standbys(row: Row) -> Finding:
    names, standbys = row["synchronous_standby_names"], row["standbys"]
    commit = row["synchronous_commit"]
    fix = "name a standby in synchronous_standby_names, and have backups"
    if names and commit in ("local", "off"):
        return Finding(
            "postgres.synchronous_standby_names",
            Severity.WARNING,
            f"synchronous_standby_names is {names!r}, but synchronous_commit {commit} does not "
            "wait for them",
            {Crash.FAILOVER: f"the last commits: {_ACKNOWLEDGED}"},
            f"ALTER SYSTEM SET synchronous_commit = on, {_RELOAD}",
        )
    if names:
        return ok("postgres.synchronous_standby_names", f"commits wait for {names}")
    if standbys:
        return Finding(
            "postgres.synchronous_standby_names",
            Severity.WARNING,
            f"{standbys} standbys, and no commit waits for one",
            {Crash.FAILOVER: f"the commits that the promoted standby lacks: {_ACKNOWLEDGED}"},
            f"ALTER SYSTEM SET synchronous_standby_names = '*', {_RELOAD}; leave it if you never "
            "fail over to them",
        )
    return Finding(
        "postgres.standbys",
        Severity.NOTE,
        "no standby is connected: there is one copy of the ledger",
        {Crash.DISK: "everything since the last backup, but for the periods that Redis holds"},
        fix,
    )


def _connections(row: Row, wanted: int) -> Finding:
    free, opened = row["max_connections"] - row["reserved"], row["sessions"]
    check, text = "postgres.max_connections", f"{opened} connections are open, of {free}"
    fix = "lower postgres.pool or gateway.workers, or raise max_connections (needs a restart)"
    effect = "beyond them keys that are not cached and cold subjects are answered 503"
    if opened * 100 >= free * _NEARLY_ALL_PERCENT:
        return Finding(check, Severity.WARNING, f"{text}: {effect}", {}, fix)
    if wanted > free:
        text = f"the processes may open {wanted} connections and the server has {free}"
        return Finding(check, Severity.NOTE, f"{text}: {effect}", {}, fix)
    return ok(check, f"{text}; the processes open {wanted} at most")
