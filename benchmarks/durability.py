"""`python -m benchmarks.durability`: what it costs that a count is on disk before it is served.

One stack; each round measures `appendfsync always` and `everysec`, switched on the running server,
one right after the other, in turn first. Prints medians and the ratio of requests/s.
"""

from __future__ import annotations

import argparse
import json
import statistics

import redis
from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import measure
from benchmarks.stack import running

MODES = ("always", "everysec")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.durability", description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--subscriptions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with running(appendfsync="always", subscriptions=options.subscriptions) as stack:
        server = redis.Redis.from_url(stack.valkey_url)
        keys = stack.keys["four_limits"]
        for number in range(options.rounds + 1):
            for mode in MODES if number % 2 else MODES[::-1]:
                server.config_set("appendfsync", mode)
                seconds = options.seconds if number else 0.5
                run = measure(stack, stack.gateway_port, keys, options.connections, seconds)
                if number:
                    runs[mode].append(run)
        server.close()
    medians = {
        mode: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for mode, found in runs.items()
    }
    pairs = zip(runs["always"], runs["everysec"], strict=True)
    ratio = statistics.median(durable["rps"] / lazy["rps"] for durable, lazy in pairs)
    if options.json:
        print(json.dumps({"ratio": ratio, "medians": medians, "runs": runs}, indent=2))
        return
    table = Table(title=f"{options.connections} connections, {options.subscriptions} subscriptions")
    for title in ("appendfsync", "requests/s", "p50 ms", "p99 ms", "gateway µs", "Redis µs"):
        table.add_column(title, justify="left" if title == "appendfsync" else "right")
    for mode, row in medians.items():
        table.add_row(
            mode,
            f"{row['rps']:,.0f}",
            f"{row['p50_us'] / 1000:.2f}",
            f"{row['p99_us'] / 1000:.2f}",
            f"{row['gateway_us']:.1f}",
            f"{row['redis_us']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"always / everysec, median of {options.rounds} pairs: {ratio:.2f}")


if __name__ == "__main__":
    main()
