"""What a flush costs: `python -m benchmarks.flush`.

Rows are (subject, meter, hour): each active subject has changed two of them since the flush before.
A flush also writes as many period rows and one subject row each. CPU is per row, of the reconciler,
Valkey and Postgres with all its processes. Rounds alternate between the sizes, which have servers
of their own.

    python -m benchmarks.flush                                        10,000 subjects, all active
    python -m benchmarks.flush --subjects 1000000 --active 10000      next to 10,000 all active
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.processes import cpu_us, rss_mib
from benchmarks.subjects import METERS, Pipe, change, load
from cli.embedded import EmbeddedPostgres, EmbeddedValkey
from core.db import connect_pool, migrate
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.redis.store import Store
from reconciler.flush import Flusher


@dataclass
class Site:
    """Servers with subjects in them, of which `active` change before each flush."""

    valkey: EmbeddedValkey
    postgres: EmbeddedPostgres
    active: list[str]
    version: int = 1

    def postgres_us(self) -> float:
        """CPU time of the postmaster, its children and those that ended."""
        pid = self.postgres.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(cpu_us(int(child)) for child in [*children, str(pid)])


@contextmanager
def site(subjects: int, active: int) -> Iterator[Site]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.chmod(0o711)
        valkey = stack.enter_context(EmbeddedValkey(folder / "v", appendfsync="always"))
        postgres = stack.enter_context(EmbeddedPostgres(folder / "p"))
        asyncio.run(migrate(postgres.url))
        everyone = load(valkey.url, postgres.url, subjects)
        # spread over all, not side by side on the same pages
        yield Site(valkey, postgres, everyone[:: max(1, subjects // active)][:active])


async def flush(at: Site, batch: int) -> dict[str, float]:
    """Changes all active subjects, then measures one flush."""
    at.version += 1
    pipe = Pipe(at.valkey.url)
    change(pipe, at.active, at.version)
    pipe.close()
    store = Store.connect(at.valkey.url, 30)
    database = await connect_pool(at.postgres.url, size=4, timeout_s=60)
    registry = MeterRegistry(METERS)
    await registry.pin(database)
    flusher = Flusher(store, database, Keyspace(), registry, batch=batch)
    await flusher.lag()
    before = at.postgres_us(), cpu_us(at.valkey.pid), time.process_time(), time.monotonic()
    result = await flusher.flush_all()
    after = at.postgres_us(), cpu_us(at.valkey.pid), time.process_time(), time.monotonic()
    await store.close()
    await database.close()
    if (result.stored, result.clean) != (len(at.active), len(at.active)):
        raise SystemExit(f"not everything was flushed: {result}")
    rows = 2 * len(at.active)
    return {
        "seconds": after[3] - before[3],
        "rows_per_s": rows / (after[3] - before[3]),
        "reconciler_us": (after[2] - before[2]) * 1e6 / rows,
        "valkey_us": (after[1] - before[1]) / rows,
        "postgres_us": (after[0] - before[0]) / rows,
        "valkey_mib": rss_mib(at.valkey.pid),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flush", description=__doc__)
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--active", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1_000, help="as reconciler.batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = {(options.active, options.active), (options.subjects, options.active)}
    runs: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        sites = {}
        for subjects, active in sorted(sizes):
            print(f"loading {subjects:,} subjects", file=sys.stderr)
            name = f"{active:,} of {subjects:,} active"
            sites[name], runs[name] = stack.enter_context(site(subjects, active)), []
        for number in range(options.rounds + 1):
            for name, at in sites.items():
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    run = runner.run(flush(at, options.batch))
                print(f"round {number} {name}: {run['rows_per_s']:,.0f} rows/s", file=sys.stderr)
                if number:  # the first warms up
                    runs[name].append(run)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    if options.json:
        print(json.dumps({"options": vars(options), "medians": medians, "runs": runs}, indent=2))
        return
    table = Table(title=f"medians of {options.rounds} rounds, appendfsync always")
    table.add_column("subjects")
    titles = ("rows/s", "seconds", "reconciler µs", "Valkey µs", "Postgres µs", "Valkey MiB")
    for title in titles:
        table.add_column(title, justify="right")
    for name, row in medians.items():
        table.add_row(
            name,
            f"{row['rows_per_s']:,.0f}",
            f"{row['seconds']:.2f}",
            *(f"{row[key]:.1f}" for key in ("reconciler_us", "valkey_us", "postgres_us")),
            f"{row['valkey_mib']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
