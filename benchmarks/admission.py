"""Admission alone, without HTTP: `python -m benchmarks.admission`.

Checks through the gateway's batcher and the admission script on a Valkey of its own: checks/s, CPU
of Redis and of the batcher's process per check, by number of limits and batch size, once with a
subject for each check of a batch and once with one for all. Then the batcher by itself, as it forms
batches: callers that ask again as soon as they have an answer, by their number.

The combinations are measured in turn; medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.processes import pin
from benchmarks.stack import Cores
from benchmarks.subjects import COSTS, METERS, PLAN, SPAN, Pipe, names, write_states
from cli.embedded import EmbeddedValkey
from core.admission.program import Program, Verdict, calendar_use, compile_program
from core.keyspace import Keyspace
from core.period import DAY_MS, HOUR_MS
from core.policy import FixedWindow, Gcra, Limit, PeriodKind, Plan, Quota, SlidingWindow
from core.redis.scripts import load
from gateway.admission.batcher import Batcher

_MOST = 10**10
_SECOND_US = 1_000_000
# The first four are those of the other benchmarks; never reached, so that all are asked.
LIMITS: tuple[Limit, ...] = (
    Gcra("per_second", "requests", 1_000_000, _SECOND_US, 1_000_000),
    SlidingWindow("per_hour", "requests", _MOST, HOUR_MS),
    FixedWindow("per_day", "requests", _MOST, DAY_MS),
    Quota("monthly", "requests", _MOST, PeriodKind.BILLING),
    FixedWindow("per_minute", "requests", _MOST, 60_000),
    SlidingWindow("per_ten_minutes", "requests", _MOST, 600_000),
    Gcra("burst", "requests", 1_000_000, _SECOND_US, 1_000_000),
    FixedWindow("per_week", "requests", _MOST, 7 * DAY_MS),
)
_CHECKS, _CALLS = 4_000, 400  # of each run, at most: small batches wait for the disk each time


@dataclass(frozen=True)
class Case:
    limits: int
    batch: int
    subjects: str  # "one", "each"

    @property
    def title(self) -> str:
        return f"{self.limits} limits, batches of {self.batch}"


def program(count: int) -> Program:
    """The first `count` limits, metering one request."""
    plan = Plan("bench", LIMITS[:count])
    return compile_program(plan, {"requests": 1}, METERS, calendar_use([plan]))


def usual_program() -> Program:
    """That of benchmarks.subjects: four limits on two meters."""
    return compile_program(PLAN, COSTS, METERS, calendar_use([PLAN]))


async def batches(
    url: str, compiled: Program, groups: Sequence[Sequence[str]], size: int
) -> tuple[float, float]:
    """One script call for each group of subjects: seconds, and CPU seconds of this process.

    Raises:
        RuntimeError: a check was not admitted, or a group took more than one call.
    """
    keyspace = Keyspace()
    batcher = Batcher(url, load("admit"), keyspace, timeout_s=30, max_batch=size)
    await batcher.start()
    started, cpu = time.perf_counter(), time.process_time()
    for group in groups:
        answers = await asyncio.gather(
            *(batcher.submit(compiled, (keyspace.state(s),), *SPAN, "", s) for s in group)
        )
        if any(answer[1] != Verdict.ADMIT for answer in answers):
            raise RuntimeError(f"not admitted: {answers[0]}")
    spent = time.perf_counter() - started, time.process_time() - cpu
    if batcher.stats.batches != len(groups):
        raise RuntimeError(f"{batcher.stats.batches} calls for {len(groups)} batches")
    await batcher.close()
    return spent


async def callers(url: str, compiled: Program, subjects: Sequence[str], count: int) -> Any:
    """`count` callers, each with one check under way: seconds, CPU seconds, number of calls."""
    keyspace = Keyspace()
    batcher = Batcher(url, load("admit"), keyspace, timeout_s=30)
    await batcher.start()
    left = iter(range(_asked(count)))

    async def ask(subject: str) -> None:
        key = (keyspace.state(subject),)
        for _ in left:
            await batcher.submit(compiled, key, *SPAN, "", subject)

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(ask, islice(cycle(subjects), count)))
    spent = time.perf_counter() - started, time.process_time() - cpu
    calls = batcher.stats.batches
    await batcher.close()
    return (*spent, calls)


def _asked(callers: int) -> int:
    return min(_CHECKS, _CALLS * callers)


def redis_us(pipe: Pipe) -> float:
    """CPU of the server so far; INFO has microseconds, where /proc has ticks."""
    text: Any = pipe.send([("INFO", "cpu")])[0]
    found = dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
    return (float(found["used_cpu_user"]) + float(found["used_cpu_sys"])) * 1e6


def run(make: Callable[[], Awaitable[Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def main() -> Any:
            return await make()

        return runner.run(main())


def case(url: str, pipe: Pipe, wanted: Case, subjects: Sequence[str]) -> dict[str, float]:
    """One run of a combination, µs per check."""
    compiled = program(wanted.limits)
    count = min(_CALLS, _CHECKS // wanted.batch)
    if wanted.subjects == "one":
        groups = [[subjects[0]] * wanted.batch] * count
    else:
        groups = [list(subjects[at % 8 * 128 :][: wanted.batch]) for at in range(count)]
    before = redis_us(pipe)
    seconds, cpu = run(lambda: batches(url, compiled, groups, wanted.batch))
    checks = count * wanted.batch
    return {
        "checks_s": checks / seconds,
        "redis_us": (redis_us(pipe) - before) / checks,
        "own_us": cpu * 1e6 / checks,
    }


def queue(url: str, pipe: Pipe, count: int, subjects: Sequence[str]) -> dict[str, float]:
    """One run of `count` callers."""
    compiled, checks = program(4), _asked(count)
    before = redis_us(pipe)
    seconds, cpu, calls = run(lambda: callers(url, compiled, subjects, count))
    return {
        "checks_s": checks / seconds,
        "batch": checks / calls,
        "redis_us": (redis_us(pipe) - before) / checks,
        "own_us": cpu * 1e6 / checks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.admission",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--limits", default="0,1,2,4,8", help=f"at most {len(LIMITS)}")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--callers", default="1,8,64,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always")
    parser.add_argument("--redis", type=Path, help="another server binary than the embedded Valkey")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    limits, sizes, waiting = (
        [int(word) for word in text.split(",")]
        for text in (options.limits, options.batches, options.callers)
    )
    cases = [
        Case(count, size, subjects)
        for count, size, subjects in product(limits, sizes, ("each", "one"))
    ]
    found: dict[Case | int, list[dict[str, float]]] = {}
    found |= {key: [] for key in cases} | {key: [] for key in waiting}
    subjects = names(1_024)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        server = stack.enter_context(
            EmbeddedValkey(folder, appendfsync=options.appendfsync, binary=options.redis)
        )
        assert server.pid is not None
        pin(server.pid, Cores.of_machine().redis)
        pipe = Pipe(server.url)
        write_states(pipe, subjects, 1)
        progress = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
        task = progress.add_task("", total=len(found) * (options.rounds + 1))
        for number in range(options.rounds + 1):
            for key, runs in found.items():
                progress.update(task, description=f"round {number}/{options.rounds}", advance=1)
                if isinstance(key, Case):
                    result = case(server.url, pipe, key, subjects)
                else:
                    result = queue(server.url, pipe, key, subjects[:64])
                if number:  # the first warms up
                    runs.append(result)
    medians = {
        key: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for key, runs in found.items()
    }
    if options.json:
        rows = [{"case": str(key), **row} for key, row in medians.items()]
        print(json.dumps({"options": vars(options) | {"redis": str(options.redis)}, "rows": rows}))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(_by_case({k: row for k, row in medians.items() if isinstance(k, Case)}))
    console.print(_by_callers({k: row for k, row in medians.items() if isinstance(k, int)}))


def _by_case(rows: dict[Case, dict[str, float]]) -> Table:
    table = Table(title="µs per check of Redis, of the batcher's process; checks/s")
    table.add_column("limits", justify="right")
    table.add_column("batch", justify="right")
    for subjects in ("one subject each", "one for all"):
        table.add_column(f"{subjects}: Redis", justify="right")
        table.add_column("batcher", justify="right")
        table.add_column("checks/s", justify="right")
    for key, row in rows.items():
        if key.subjects != "each":
            continue
        other = rows[Case(key.limits, key.batch, "one")]
        cells = [
            text
            for each in (row, other)
            for text in (
                f"{each['redis_us']:.1f}",
                f"{each['own_us']:.1f}",
                f"{each['checks_s']:,.0f}",
            )
        ]
        table.add_row(str(key.limits), str(key.batch), *cells)
    return table


def _by_callers(rows: dict[int, dict[str, float]]) -> Table:
    table = Table(title="Four limits, 64 subjects: batches as they form")
    for title in ("callers", "batch", "Redis µs", "batcher µs", "checks/s"):
        table.add_column(title, justify="right")
    for count, row in rows.items():
        table.add_row(
            str(count),
            f"{row['batch']:.1f}",
            f"{row['redis_us']:.1f}",
            f"{row['own_us']:.1f}",
            f"{row['checks_s']:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()
