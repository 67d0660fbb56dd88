"""`python -m benchmarks`: what one request costs, next to the same request sent direct.

Alternates direct and gateway runs in one go and prints medians: requests/s, p50, p99, CPU
microseconds per request of the gateway and of Redis (user + system, from /proc), and resident
memory. The gateway is pinned to core 0; client, upstream and Redis share core 1, so requests/s of
the cheap variants are bounded by the client. Compare CPU per request and ratios, not absolute
rates of a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.processes import pinned, rss_mib, total_cpu_us
from benchmarks.stack import Stack, running


def measure(
    stack: Stack, port: int, keys: list[str], connections: int, seconds: float
) -> dict[str, float]:
    """One run of the client; CPU per request is 0 for what was not involved."""
    gateway = stack.gateway_pids if port == stack.gateway_port else []
    before = total_cpu_us(gateway), total_cpu_us([stack.valkey_pid])
    command = [sys.executable, "-m", "benchmarks.client", "--port", str(port)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    command += ["--keys", ",".join(keys)]
    result: dict[str, Any] = json.loads(
        subprocess.run(
            pinned(stack.cores.client, command), check=True, capture_output=True, text=True
        ).stdout
    )
    after = total_cpu_us(gateway), total_cpu_us([stack.valkey_pid])
    requests = result["requests"]
    unexpected = {s: n for s, n in result["statuses"].items() if s not in ("200", "429")}
    if unexpected:
        raise SystemExit(f"unexpected answers: {unexpected}")
    return {
        "rps": requests / result["seconds"],
        "p50_us": result["p50_us"],
        "p99_us": result["p99_us"],
        "gateway_us": (after[0] - before[0]) / requests,
        "redis_us": (after[1] - before[1]) / requests if gateway else 0.0,
        "rss_mib": sum(map(rss_mib, gateway)),
        "refused": result["statuses"].get("429", 0) / requests,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    variants: dict[str, tuple[str, int]] = {
        "direct to the upstream": ("", 1),
        "key, no limits": ("unlimited", 1),
        "key + 4 limits, 1 subscription": ("four_limits", 1),
        "key + 4 limits, 64 subscriptions": ("four_limits", 64),
        "key + demo plan (with concurrency)": ("demo", 64),
        "refused (quota exhausted)": ("exhausted", 64),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    console = Console(stderr=True)
    with running(appendfsync=options.appendfsync, subscriptions=64) as stack:
        for number in range(options.rounds + 1):
            label = f"round {number} of {options.rounds}" if number else "warming up"
            with console.status(label):
                for name, (plan, count) in variants.items():
                    port = stack.gateway_port if plan else stack.upstream_port
                    keys = stack.keys[plan][:count] if plan else []
                    seconds = options.seconds if number else 0.5
                    run = measure(stack, port, keys, options.connections, seconds)
                    if number:
                        rows[name].append(run)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in rows.items()
    }
    if options.json:
        print(json.dumps({"options": vars(options), "medians": medians, "runs": rows}, indent=2))
        return
    table = Table(
        title=f"{options.connections} connections, appendfsync {options.appendfsync}, "
        f"medians of {options.rounds} alternating rounds"
    )
    table.add_column("variant")
    for title in ("requests/s", "p50 ms", "p99 ms", "gateway µs", "Redis µs", "RSS MiB"):
        table.add_column(title, justify="right")
    for name, row in medians.items():
        table.add_row(
            name,
            f"{row['rps']:,.0f}",
            f"{row['p50_us'] / 1000:.2f}",
            f"{row['p99_us'] / 1000:.2f}",
            f"{row['gateway_us']:.1f}" if row["gateway_us"] else "–",
            f"{row['redis_us']:.1f}" if row["redis_us"] else "–",
            f"{row['rss_mib']:.0f}" if row["rss_mib"] else "–",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
