"""That memory does not grow: `python -m benchmarks.soak --seconds 600`.

One worker under full load, new connections every few seconds, admitted, rejected and with a wrong
key in turn; its resident memory is sampled every second. A straight line is fitted to the samples
after the first fifth, which is when caches fill. Growth is reported when the line rises, beyond
what its error explains, by more than 1 MiB in ten minutes, and by half of that within the samples
(a short run proves nothing about ten minutes); the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import threading
import time
from itertools import cycle

from rich.console import Console

from benchmarks.closedloop import closed_loop
from benchmarks.peers import Target
from benchmarks.processes import rss_mib
from benchmarks.stack import Stack, running

_CHUNK_S = 5
_WARM_SHARE = 0.2
_GROWTH_MIB = 1.0  # in ten minutes
_PERIOD_S = 600
_SURE = 3.0  # standard errors; samples of memory are not independent


def soak(stack: Stack, seconds: float) -> dict[str, object]:
    """Samples (seconds, MiB) and the line through them; `grows` is the verdict."""
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    started = time.monotonic()

    def sample() -> None:
        while not stop.wait(1):
            now = time.monotonic() - started
            samples.append((now, sum(map(rss_mib, stack.gateway_pids))))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    requests = 0.0
    kinds = cycle((stack.keys["four_limits"], stack.keys["exhausted"], ["of-nobody"]))
    while time.monotonic() - started < seconds:
        target = Target(stack.gateway_port, "/1k", tuple(next(kinds)))
        requests += closed_loop(target, 64, _CHUNK_S, stack.cores.client)["requests"]
    stop.set()
    thread.join()
    return line(samples) | {"requests": requests, "samples": samples}


def line(samples: list[tuple[float, float]]) -> dict[str, object]:
    """Least squares through (seconds, MiB) after the first fifth."""
    first = samples[-1][0] * _WARM_SHARE
    times, sizes = zip(*(each for each in samples if each[0] >= first), strict=True)
    slope, start = statistics.linear_regression(times, sizes)
    rest = sum((y - start - slope * x) ** 2 for x, y in zip(times, sizes, strict=True))
    spread = sum((x - statistics.fmean(times)) ** 2 for x in times)
    error = math.sqrt(rest / (len(times) - 2) / spread)
    surely = slope - _SURE * error
    seen = surely * (times[-1] - times[0])
    return {
        "mib_per_10_min": slope * _PERIOD_S,
        "error_mib_per_10_min": error * _PERIOD_S,
        "first_mib": sizes[0],
        "last_mib": sizes[-1],
        "grows": surely * _PERIOD_S > _GROWTH_MIB and seen > _GROWTH_MIB / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", action="store_true", help="with all samples")
    options = parser.parse_args()
    with (
        Console(stderr=True).status(f"{options.seconds:.0f} s of load"),
        running(appendfsync="everysec", subscriptions=64) as stack,
    ):
        found = soak(stack, options.seconds)
    if not options.json:
        del found["samples"]
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["grows"] else 0)


if __name__ == "__main__":
    main()
