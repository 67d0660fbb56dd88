"""Forward-only migrations: `migrations/NNNN_name.sql`, each applied once, in order.

1. Take a session advisory lock: of several processes one migrates, the others wait for it.
2. Compare what `schema_migrations` records with the files; refuse a database that is newer than
   this code, and a file that was edited after it was applied.
3. Apply each missing file and record it in the same transaction: a crash leaves whole migrations.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from core.db.pool import connect_once
from core.errors import StoreUnavailableError, TallygateError

_DIR = Path(__file__).parent / "migrations"
_FILE = re.compile(r"^(?P<version>\d{4})_(?P<name>[a-z0-9_]+)\.sql$")
_LOCK = 0x7461_6C6C_7967  # "tallyg"; any fixed number that nobody else takes
_CONNECT_TIMEOUT_S = 10.0
_LOCK_TIMEOUT = "120s"  # another process is migrating: longer than that wants a person

_CREATE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""
_INSERT = "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)"


class MigrationError(TallygateError):
    """The database and the migrations of this code do not fit together."""


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: str
    checksum: str  # SHA-256 in hex of the text, line ends normalised

    @property
    def label(self) -> str:
        return f"{self.version:04d}_{self.name}"


def load_migrations(directory: Path = _DIR) -> list[Migration]:
    """The migration files in order.

    Raises:
        MigrationError: a file name is malformed, or the numbers are not 1, 2, 3 …
    """
    found = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE.match(path.name)
        if match is None:
            raise MigrationError(f"{path.name}: name a migration NNNN_what_it_does.sql")
        sql = path.read_text("utf-8")  # universal newlines: a checkout with CRLF is no edit
        checksum = hashlib.sha256(sql.encode()).hexdigest()
        found.append(Migration(int(match["version"]), match["name"], sql, checksum))
    for expected, migration in enumerate(found, start=1):
        if migration.version != expected:
            raise MigrationError(
                f"{migration.label}: number {expected:04d} expected; migrations are numbered "
                "1, 2, 3 … without gaps or repeats"
            )
    return found


async def migrate(dsn: str, directory: Path = _DIR) -> list[str]:
    """Bring the database at `dsn` up to this code; the labels applied now, oldest first.

    Raises:
        MigrationError: the database is newer than the code, an applied migration was edited, or
            a migration fails (it is rolled back, those before it stay).
        StoreUnavailableError: Postgres cannot be reached, or is lost on the way: run it again.
    """
    migrations = load_migrations(directory)
    connection = await connect_once(
        dsn, purpose="migrate", timeout_s=_CONNECT_TIMEOUT_S, command_timeout_s=None
    )
    try:
        await _lock(connection)
        await connection.execute(_CREATE)
        recorded = await connection.fetch(
            "SELECT version, name, checksum FROM schema_migrations ORDER BY version"
        )
        _check(migrations, {row["version"]: row for row in recorded})
        pending = migrations[len(recorded) :]
        for migration in pending:
            await _apply(connection, migration)
        return [migration.label for migration in pending]
    except (OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
        raise StoreUnavailableError(
            f"Postgres went away during the migration ({error}); nothing is half applied: "
            "run it again"
        ) from error
    finally:
        await _close(connection)  # also gives the lock back


async def _close(connection: Any) -> None:
    """Say goodbye: a database with a session about to end cannot be copied or dropped."""
    try:
        await connection.close(timeout=_CONNECT_TIMEOUT_S)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


async def _lock(connection: Any) -> None:
    await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
    try:
        await connection.execute("SELECT pg_advisory_lock($1::bigint)", _LOCK)
    except asyncpg.LockNotAvailableError as error:
        raise MigrationError(
            f"another process has been migrating this database for {_LOCK_TIMEOUT}; wait for it "
            "or end it, then run this again"
        ) from error


def _check(migrations: list[Migration], recorded: dict[int, Any]) -> None:
    newest = len(migrations)
    ahead = [f"{v:04d}_{row['name']}" for v, row in recorded.items() if v > newest]
    if ahead:
        raise MigrationError(
            f"the database is newer than this version of Tallygate: it has {', '.join(ahead)} "
            f"and this code ends at {newest:04d}; install the newer version again"
        )
    for migration in migrations[: max(recorded, default=0)]:
        row = recorded.get(migration.version)
        if row is None:
            raise MigrationError(
                f"{migration.label} was never applied, but a later one was; restore the "
                "database from a backup or mend schema_migrations by hand"
            )
        if row["checksum"] != migration.checksum:
            raise MigrationError(
                f"{migration.label} was edited after it was applied to this database; restore "
                "the file and put the change into a new migration"
            )


async def _apply(connection: Any, migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(_INSERT, migration.version, migration.name, migration.checksum)
    except asyncpg.PostgresError as error:
        if isinstance(error, asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError):
            raise
        raise MigrationError(f"{migration.label} failed and was rolled back: {error}") from error
