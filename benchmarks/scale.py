"""What subjects cost by being there: `python -m benchmarks.scale`.

Memory of an active subject with four limits and two meters: its hash, and its places in the sets of
changed and of idle subjects. And Redis' CPU time per admitted check, in batches of 32 different
ones of 1,000 active subjects, spread over ever more that are present; rounds alternate between the
sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.admission import batches, usual_program
from benchmarks.subjects import Pipe, change, names, write_states
from cli.embedded import EmbeddedValkey
from core.keyspace import Keyspace

_BATCH = 32
_MEASURED = 20_000
_ACTIVE = 1_000


def info(pipe: Pipe, section: str) -> dict[str, str]:
    text: Any = pipe.send([("INFO", section)])[0]
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)


def used(pipe: Pipe) -> int:
    return int(info(pipe, "memory")["used_memory"])


def cpu_us(pipe: Pipe) -> float:
    found = info(pipe, "cpu")
    return (float(found["used_cpu_user"]) + float(found["used_cpu_sys"])) * 1e6


def memory(url: str) -> dict[str, float]:
    """Bytes a subject."""
    keyspace, pipe = Keyspace(), Pipe(url)
    subjects = names(_MEASURED)
    first = used(pipe)
    write_states(pipe, subjects, 1_234_567)
    states = used(pipe)
    change(pipe, subjects, 1_234_568)
    changed = used(pipe)
    now = 1_790_000_000_000
    pipe.send(("ZADD", keyspace.idle(0), now, keyspace.state(subject)) for subject in subjects)
    idle = used(pipe)
    sample = [keyspace.state(subject) for subject in subjects[::20]]
    usage: list[Any] = pipe.send(("MEMORY", "USAGE", key) for key in sample)
    encoding: Any = pipe.send([("OBJECT", "ENCODING", sample[0])])[0]
    dirty_usage, idle_usage = (
        pipe.send([("MEMORY", "USAGE", key, "SAMPLES", 0)])[0]
        for key in (keyspace.dirty(0), keyspace.idle(0))
    )
    pipe.close()
    assert isinstance(dirty_usage, int)
    assert isinstance(idle_usage, int)
    return {
        "encoding": encoding.decode(),
        "usage_state": sum(usage) / len(usage),
        "usage_dirty": dirty_usage / len(subjects),
        "usage_idle": idle_usage / len(subjects),
        "used_state": (states - first) / len(subjects),
        "used_dirty": (changed - states) / len(subjects),
        "used_idle": (idle - changed) / len(subjects),
        "used_all": (idle - first) / len(subjects),
    }


def admit(url: str, subjects: list[str], count: int) -> None:
    """`count` script calls, each for other subjects."""
    groups = [random.sample(subjects, _BATCH) for _ in range(count)]
    asyncio.run(batches(url, usual_program(), groups, _BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--present", default="1000,100000,1000000", help="sizes, comma separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=1_000, help="of each round")
    parser.add_argument("--server", type=Path, help="another server of the family")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))

        def server(name: str) -> str:
            made = EmbeddedValkey(
                folder / name,
                appendfsync="always",
                binary=options.server,
                config={"auto-aof-rewrite-percentage": "0"},  # no fork while it is measured
            )
            return stack.enter_context(made).url

        found = memory(server("memory"))
        sizes = [] if options.memory_only else [int(word) for word in options.present.split(",")]
        urls, pipes, runs, active = {}, {}, {}, {}
        for size in sizes:
            print(f"loading {size:,} subjects", file=sys.stderr)
            urls[size] = server(str(size))
            pipes[size], runs[size] = Pipe(urls[size]), list[float]()
            subjects = names(size)
            write_states(pipes[size], subjects, 1)
            active[size] = random.sample(subjects, _ACTIVE)
        for number in range(options.rounds + 1):
            for size in sizes:
                before = cpu_us(pipes[size])
                admit(urls[size], active[size], options.batches)
                cost = (cpu_us(pipes[size]) - before) / (options.batches * _BATCH)
                print(f"round {number} {size:,}: {cost:.2f} µs", file=sys.stderr)
                if number:  # the first warms up
                    runs[size].append(cost)
    costs = {size: statistics.median(run) for size, run in runs.items()}
    if options.json:
        print(json.dumps({"memory": found, "admit_us": costs, "runs": runs}, indent=2))
        return
    console = Console()
    console.print(found)
    if not costs:
        return
    table = Table(title=f"CPU of the server per check, medians of {options.rounds} rounds")
    for title in ("subjects present", "µs", "ratio"):
        table.add_column(title, justify="right")
    for size, cost in costs.items():
        table.add_row(f"{size:,}", f"{cost:.2f}", f"{cost / costs[sizes[0]]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
