"""What a gateway adds to the latency of its upstream, at a rate that all of them can serve."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.peers import Peer, Target
from benchmarks.processes import pinned
from benchmarks.stack import Stack

_SECONDS = 2
_GRACE_S = 30


def at_rate(stack: Stack, peers: Sequence[Peer], rate: float, rounds: int) -> dict[str, Any]:
    """Medians of each percentile over the rounds, in ms, by peer; `added_p99_ms` is the median of
    the differences between Tallygate and the direct upstream, each pair from one round."""
    runs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        turn = number % len(peers)
        for peer in [*peers[turn:], *peers[:turn]]:
            target = peer.target(rejected=False, size=1)
            runs[peer.name].append(_run(target, rate, stack.cores.client))
    names = [name for name, value in runs[peers[0].name][0].items() if not isinstance(value, dict)]
    found: dict[str, Any] = {
        "rate": rate,
        "runs": runs,
        "peers": {
            peer: {name: statistics.median(run[name] for run in each) for name in names}
            for peer, each in runs.items()
        },
    }
    if "direct" in runs and "tallygate" in runs:
        pairs = zip(runs["tallygate"], runs["direct"], strict=True)
        found["added_p99_ms"] = statistics.median(own["p99"] - bare["p99"] for own, bare in pairs)
    return found


def _run(target: Target, rate: float, cores: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", prefix="bench-keys-") as keys:
        keys.write("".join(f"{key}\n" for key in target.keys))
        keys.flush()
        command = [sys.executable, "-m", "benchmarks.openloop", "--rate", str(rate)]
        command += ["--url", f"http://127.0.0.1:{target.port}{target.path}"]
        command += ["--seconds", str(_SECONDS), "--keys-file", keys.name]
        done = subprocess.run(
            pinned(cores, command),
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS + _GRACE_S,
        )
    return json.loads(done.stdout)  # type: ignore[no-any-return]
