"""Postgres, the system of record: pool, named queries, LISTEN, migrations.

The only package that imports `asyncpg`. May import `core.errors`, `core.clock` and libraries. What
callers see: `Database` and `Transaction` (queries by name from `sql/*.sql`), `Listener`,
`migrate`, and two errors: `StoreUnavailableError` when Postgres did not answer, `ConstraintError`
when it refused a row.
"""

from core.db.listen import Listener
from core.db.migrate import MigrationError, migrate
from core.db.pool import ConstraintError, Database, QueryHook, Row, Transaction, connect_pool
from core.db.queries import Queries, load_queries

__all__ = [
    "ConstraintError",
    "Database",
    "Listener",
    "MigrationError",
    "Queries",
    "QueryHook",
    "Row",
    "Transaction",
    "connect_pool",
    "load_queries",
    "migrate",
]
