"""What a second worker brings: one worker on one core against two on two, in turn."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.closedloop import closed_loop
from benchmarks.peers import Target
from benchmarks.processes import total_cpu_us
from benchmarks.stack import Stack

_CONNECTIONS = 64
_SECONDS = 2


def scale(stack: Stack, rounds: int) -> dict[str, Any]:
    """`by_cpu`: 2 x the gateway's CPU per request with one worker over that with two, which is what
    two free cores would give as long as Redis is not the limit. `by_rate`: requests/s of two over
    one, None where the second worker has to share its core with client, upstream and Redis."""
    cores = stack.cores
    port, pids = stack.start_gateway(2, f"{cores.gateway},{cores.second}")
    gateways = {1: (stack.gateway_port, stack.gateway_pids), 2: (port, pids)}
    runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    keys = tuple(stack.keys["four_limits"])
    for number in range(rounds + 1):
        for workers in (1, 2) if number % 2 else (2, 1):
            at, processes = gateways[workers]
            before = total_cpu_us(processes), total_cpu_us([stack.valkey_pid])
            seconds = _SECONDS if number else 1
            found = closed_loop(Target(at, "/1k", keys), _CONNECTIONS, seconds, cores.client)
            after = total_cpu_us(processes), total_cpu_us([stack.valkey_pid])
            if number:
                runs[workers].append({
                    "rps": found["requests"] / found["seconds"],
                    "gateway_us": (after[0] - before[0]) / found["requests"],
                    "redis_us": (after[1] - before[1]) / found["requests"],
                })  # fmt: skip
    pairs = list(zip(runs[1], runs[2], strict=True))
    rate = statistics.median(two["rps"] / one["rps"] for one, two in pairs)
    return {
        "by_cpu": statistics.median(
            2 * one["gateway_us"] / two["gateway_us"] for one, two in pairs
        ),
        "by_rate": rate if cores.apart else None,
        "by_rate_sharing": rate,
        "runs": {str(workers): found for workers, found in runs.items()},
    }
