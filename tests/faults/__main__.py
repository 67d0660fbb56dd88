"""`python -m tests.faults`: rounds of faults outside of pytest, with progress and histories.

A round that fails leaves a directory with its schedule, answers, tables and logs; the same seed
plans the same faults and requests again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import history
from tests.faults.faults import FAULTS
from tests.faults.rounds import run_round
from tests.faults.rules import EVERYTHING
from tests.faults.world import start_world


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything held, 1 when a round failed, 130 when interrupted."""
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = f" --faults {','.join(arguments.faults)}" if arguments.faults else ""
    failed: list[int] = []
    requests = done = 0
    begun = time.monotonic()
    try:
        with start_world(EVERYTHING) as world:
            for seed in range(arguments.seed, arguments.seed + arguments.rounds):
                round_, violations = run_round(world, seed, arguments.faults)
                done, requests = done + 1, requests + len(round_.requests)
                what = ", ".join(f"{row.fault} ({row.what})" for row in round_.faults)
                print(
                    f"seed {seed}  {round_.seconds:4.1f} s  {len(round_.requests)} requests  "
                    f"{'FAILED' if violations else 'ok'}  {what}",
                    flush=True,
                )
                if violations:
                    failed.append(seed)
                    replay = f"again: python -m tests.faults --seed {seed}{options}"
                    path = history.write(
                        arguments.out,
                        round_,
                        violations,
                        world.logs() | world.server_logs(),
                        replay,
                    )
                    for violation in violations[:20]:
                        print(f"    {violation[:400]}")
                    print(f"    {replay}\n    written to {path}", flush=True)
                    if len(failed) >= arguments.max_failures:
                        break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        seconds = time.monotonic() - begun
        print(f"{done} rounds, {requests} requests, {seconds:.0f} s, failed seeds: {failed}")
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--rounds", type=int, default=1, help="each with the next seed")
    parser.add_argument(
        "--faults", type=_names, default=[], metavar="A,B", help=f"of {', '.join(FAULTS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="for histories")
    parser.add_argument("--max-failures", type=int, default=5, help="then no further rounds")
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(FAULTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not a fault")
    return names


if __name__ == "__main__":
    sys.exit(main())
