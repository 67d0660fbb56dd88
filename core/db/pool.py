"""A small pool over asyncpg: queries by name, every wait bounded, one error for "no answer".

Session state (SET, LISTEN, session advisory locks, temporary tables) must not outlive a call:
connections go back to the pool without the usual RESET, which would cost a round trip each time.
Inside a transaction use `SET LOCAL` and `pg_advisory_xact_lock`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import asyncpg

from core import clock
from core.db.queries import Queries, load_queries
from core.errors import StoreUnavailableError, TallygateError

Row = asyncpg.Record
"""One result row: `row["column"]`; timestamptz as aware datetime, numeric as Decimal."""

QueryHook = Callable[[str, float, bool], None]
"""Called after each query: name, seconds, whether Postgres answered without an error."""

# What Postgres says when it cannot serve just now: shutdown, start-up, crash, failover to a
# read-only standby, too many connections, out of resources, statement time-out, a lock that another
# transaction holds too long or that two want in different order.
_UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    asyncpg.TransactionRollbackError,
    asyncpg.InternalClientError,
)


class ConstraintError(TallygateError):
    """A row breaks a constraint of the schema; `constraint` is its name.

    Or a value is none that Postgres can hold (a NUL in a text, a date out of range): then
    `constraint` is ''.
    """

    def __init__(self, message: str, constraint: str) -> None:
        self.constraint = constraint
        super().__init__(message)


class _Connection(asyncpg.Connection):
    def get_reset_query(self) -> str:
        return ""  # see the module's docstring


class _Runner:
    """The query methods; `Database` runs each on a pooled connection, `Transaction` on its own."""

    queries: Queries

    async def _run(self, name: str, method: str, *args: Any) -> Any:
        raise NotImplementedError

    async def fetch(self, name: str, *args: Any) -> list[Row]:
        """All rows of query `name`.

        Raises (as all query methods do):
            StoreUnavailableError: no connection or no answer in time.
            ConstraintError: the schema refused a row.
            LookupError: there is no query of that name.
        """
        rows: list[Row] = await self._run(name, "fetch", *args)
        return rows

    async def fetchrow(self, name: str, *args: Any) -> Row | None:
        """The first row of query `name`, None when there is none."""
        row: Row | None = await self._run(name, "fetchrow", *args)
        return row

    async def fetchval(self, name: str, *args: Any) -> Any:
        """The first column of the first row of query `name`, None when there is no row."""
        return await self._run(name, "fetchval", *args)

    async def execute(self, name: str, *args: Any) -> int:
        """Run query `name`; the number of rows it touched."""
        tag: str = await self._run(name, "execute", *args)
        count = tag.rsplit(" ", 1)[-1]
        return int(count) if count.isdigit() else 0

    async def executemany(self, name: str, args: Sequence[Sequence[Any]]) -> None:
        """Run query `name` once for each row of arguments, all or none."""
        await self._run(name, "executemany", args)


class Transaction(_Runner):
    """The query methods inside one transaction; from `Database.transaction()`."""

    def __init__(self, database: Database, connection: Any) -> None:
        self.queries = database.queries
        self._database = database
        self._connection = connection

    async def _run(self, name: str, method: str, *args: Any) -> Any:
        sql = self.queries[name]
        with self._database._observed(name):
            return await getattr(self._connection, method)(sql, *args)


class Database(_Runner):
    """A pool of connections to one Postgres.

    `healthy` tells whether the last attempt to reach it was answered (False before the first);
    `on_query` may be set at any time.
    """

    def __init__(
        self, pool: asyncpg.Pool[Any], *, timeout_s: float, on_query: QueryHook | None = None
    ) -> None:
        self.queries = load_queries()
        self.healthy = False
        self.on_query = on_query
        self.timeout_s = timeout_s
        self._pool = pool

    async def _run(self, name: str, method: str, *args: Any) -> Any:
        sql = self.queries[name]
        with self._observed(name):
            async with self._pool.acquire(timeout=self.timeout_s) as connection:
                return await getattr(connection, method)(sql, *args)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction (read committed): commits at the end, rolls back on any exception.

        Raises:
            StoreUnavailableError: also when it is the COMMIT that is not answered: whether it
                took effect is then unknown, so make what runs inside repeatable.
        """
        with self._translated():
            connection: Any = await self._pool.acquire(timeout=self.timeout_s)
        try:
            with self._translated():
                transaction = connection.transaction()
                await transaction.start()
            try:
                yield Transaction(self, connection)
            except BaseException:
                await _give_up(transaction.rollback)
                raise
            with self._translated():
                await transaction.commit()
        finally:
            # Rolls back and, if need be, cuts the connection; what happened before matters more.
            await _give_up(partial(self._pool.release, connection, timeout=self.timeout_s))

    async def ping(self) -> bool:
        """Whether Postgres answers now; never raises. Updates `healthy`."""
        try:
            await self.fetchval("ping")
        except StoreUnavailableError:
            return False
        return True

    async def close(self) -> None:
        """Close all connections; those that do not close in time are cut."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @contextmanager
    def _observed(self, name: str) -> Iterator[None]:
        started = clock.monotonic()
        ok = False
        try:
            with self._translated(name):
                yield
            ok = True
        finally:
            if self.on_query is not None:
                self.on_query(name, clock.monotonic() - started, ok)

    @contextmanager
    def _translated(self, name: str = "transaction") -> Iterator[None]:
        try:
            yield
        except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
            self.healthy = True
            constraint = getattr(error, "constraint_name", None) or ""
            raise ConstraintError(f"{name}: {error}", constraint) from error
        except _UNAVAILABLE as error:
            self.healthy = False
            raise _unavailable(name, error) from error
        except asyncpg.ClientConfigurationError as error:
            raise TallygateError(f"postgres.url: not a Postgres URL: {error}") from error
        except asyncpg.InterfaceError as error:
            # asyncpg has one class for a lost connection and for wrong arguments; the latter (its
            # own DataError, a ValueError) is a bug that must stay visible.
            if isinstance(error, ValueError) or not _is_lost(str(error)):
                raise
            self.healthy = False
            raise _unavailable(name, error) from error
        else:
            self.healthy = True


async def _give_up(ending: Callable[[], Awaitable[object]]) -> None:
    """Run the end of something that may have failed already: a lost connection is no news."""
    with suppress(*_UNAVAILABLE, asyncpg.InterfaceError):
        await ending()


def _is_lost(message: str) -> bool:
    return any(word in message for word in ("closed", "closing", "released back"))


def _unavailable(what: str, error: BaseException) -> StoreUnavailableError:
    reason = str(error) or type(error).__name__
    return StoreUnavailableError(
        f"Postgres did not answer ({what}: {reason}); check that it runs and that postgres.url "
        "or TALLYGATE_POSTGRES_URL points to it"
    )


async def connect_pool(
    url: str,
    *,
    size: int,
    timeout_s: float,
    on_query: QueryHook | None = None,
    require: bool = True,
) -> Database:
    """Open a pool of at most `size` connections.

    Each wait (for a free connection, to connect, for an answer) is at most `timeout_s` seconds.
    Connections open when they are first needed. With `require=False` a Postgres that is down is
    no error here: a gateway may start without it and serve once it is back.

    Raises:
        StoreUnavailableError: `require` and Postgres does not answer.
        TallygateError: the URL is no Postgres URL (without `require`: at the first query).
    """
    pool: asyncpg.Pool[Any] = await asyncpg.create_pool(
        url,
        min_size=0,
        max_size=size,
        timeout=timeout_s,
        command_timeout=timeout_s,
        connection_class=_Connection,
        server_settings={"application_name": "tallygate", "timezone": "UTC"},
    )
    database = Database(pool, timeout_s=timeout_s, on_query=on_query)
    if require:
        try:
            await database.fetchval("ping")
        except BaseException:
            pool.terminate()
            raise
    return database


async def connect_once(
    url: str, *, purpose: str, timeout_s: float, command_timeout_s: float | None
) -> Any:
    """One connection outside any pool, for LISTEN and migrations (an `asyncpg.Connection`).

    `pg_stat_activity` shows it as `tallygate <purpose>`.

    Raises:
        StoreUnavailableError: Postgres cannot be reached, or refuses the login.
        TallygateError: the URL is no Postgres URL.
    """
    try:
        return await asyncpg.connect(
            url,
            timeout=timeout_s,
            command_timeout=command_timeout_s,
            server_settings={"application_name": f"tallygate {purpose}", "timezone": "UTC"},
        )
    except asyncpg.ClientConfigurationError as error:
        raise TallygateError(f"postgres.url: not a Postgres URL: {error}") from error
    except (*_UNAVAILABLE, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise _unavailable("connect", error) from error
