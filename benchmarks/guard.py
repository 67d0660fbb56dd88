"""Guards against a slower release: `python -m benchmarks.guard`.

Runs this tree and the release before (benchmarks/baseline.txt) side by side on one machine, each
with stores and a gateway of its own, and loads them in turn. Each round gives one ratio of CPU time
per request (gateway and Redis), now over before; what else the machine does hits both. It fails
only when the lower confidence bound of the median ratio is above the tolerance, so noise, which
widens the interval, lets things pass rather than fail. No absolute time plays a part.

Exit status: 0 not slower or nothing to compare with (it says which), 1 slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.processes import pinned, total_cpu_us
from benchmarks.stack import Cores

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1.25
PLANS = {"admitted": "four_limits", "rejected": "exhausted"}
_CONNECTIONS = 64
_CUSTOMERS = 64
_CONFIDENCE = 0.95
_START_S = 90
_GIT_S = 30

# Run by each side on its own tree, so that both bring the plans and the set-up that they know:
# `benchmarks.stack.running` keeps these two arguments, and its Stack these four names.
_SIDE = f"""
import json, sys
from benchmarks.stack import running
with running(appendfsync="everysec", subscriptions={_CUSTOMERS}) as stack:
    print(json.dumps({{
        "port": stack.gateway_port, "keys": stack.keys, "gateway": stack.gateway_pids,
        "redis": stack.valkey_pid,
    }}), flush=True)
    sys.stdin.read()
"""


class UnavailableError(Exception):
    """There is nothing to compare with here; the message says why."""


class StartError(Exception):
    """A stack does not start; the message says what it printed."""


@dataclass(frozen=True)
class Verdict:
    """Of one kind of traffic: ratios of now over before, one a round."""

    traffic: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def lower(self) -> float:
        return lower_bound(self.ratios)

    @property
    def slower(self) -> bool:
        return self.lower > TOLERANCE

    def __str__(self) -> str:
        return (
            f"{self.traffic}: CPU per request {self.median:.2f} x the release before "
            f"(at least {self.lower:.2f} with {_CONFIDENCE:.0%} confidence; allowed {TOLERANCE})"
        )


def lower_bound(values: Sequence[float]) -> float:
    """A one-sided lower confidence bound of the median: an order statistic, whatever the
    distribution (the sign test turned round).

    Raises:
        ValueError: fewer than five values, which bound nothing at this confidence.
    """
    count, rank, risk = len(values), 0, 0.0
    while (risk := risk + math.comb(count, rank) / 2**count) <= 1 - _CONFIDENCE:
        rank += 1
    if rank == 0:
        raise ValueError(f"{count} values are too few for {_CONFIDENCE:.0%}")
    return sorted(values)[rank - 1]


def baseline() -> str:
    """The commit or tag of benchmarks/baseline.txt."""
    lines = (ROOT / "benchmarks/baseline.txt").read_text().splitlines()
    return next(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@contextmanager
def tree(revision: str) -> Iterator[Path]:
    """The project as it was, in a folder that lasts as long as the context.

    Raises:
        UnavailableError: no git here, or a clone too shallow to have it.
    """
    try:
        archive = subprocess.run(
            ["git", "archive", "--format=tar", revision],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=_GIT_S,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{revision} is not in this checkout: fetch more of it") from error
    with tempfile.TemporaryDirectory(prefix="bench-base-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield folder


@contextmanager
def side(folder: Path) -> Iterator[dict[str, Any]]:
    """A stack of that tree: port, keys by plan, process ids.

    Raises:
        StartError: it did not start; the message ends with what it said.
    """
    # Before the editable install of this tree, which is on the path as well.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SIDE],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                process.wait(_START_S)
                log.seek(0)
                raise StartError(f"{folder} does not start:\n{log.read()[-2000:]}")
            yield json.loads(line)
        finally:
            process.stdin.close()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def cost(stack: dict[str, Any], traffic: str, seconds: float) -> float:
    """CPU µs per request of gateway and Redis in one run.

    Raises:
        RuntimeError: an answer was not what the traffic asks for.
    """
    pids = [*stack["gateway"], stack["redis"]]
    before = total_cpu_us(pids)
    command = [sys.executable, "-m", "benchmarks.client", "--port", str(stack["port"])]
    command += ["--connections", str(_CONNECTIONS), "--seconds", str(seconds)]
    command += ["--keys", ",".join(stack["keys"][PLANS[traffic]])]
    run = subprocess.run(
        pinned(Cores.of_machine().client, command),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=seconds + _START_S,
    )
    found = json.loads(run.stdout)
    wanted = "200" if traffic == "admitted" else "429"
    if found["statuses"].get(wanted, 0) < found["requests"]:
        raise RuntimeError(f"{traffic}: unexpected answers {found['statuses']}")
    return float((total_cpu_us(pids) - before) / found["requests"])


def guard(before: Path, now: Path = ROOT, rounds: int = 9, seconds: float = 0.5) -> list[Verdict]:
    """Both trees, alternating; one verdict for each kind of traffic.

    Raises:
        UnavailableError: the one before does not start with what is installed now.
        StartError: the one of now does not.
    """
    ratios: dict[str, list[float]] = {traffic: [] for traffic in PLANS}
    with ExitStack() as stacks_up:
        try:
            old = stacks_up.enter_context(side(before))
        except StartError as error:
            raise UnavailableError(str(error)) from error
        new = stacks_up.enter_context(side(now))
        for traffic in PLANS:  # the first request of each key asks Postgres, and uses up a quota
            for stack in (old, new):
                _warm(stack, traffic, seconds)
        for number in range(rounds):
            for traffic, found in ratios.items():
                stacks = (old, new) if number % 2 else (new, old)
                costs = {id(stack): cost(stack, traffic, seconds) for stack in stacks}
                found.append(costs[id(new)] / costs[id(old)])
    return [Verdict(traffic, tuple(found)) for traffic, found in ratios.items()]


def _warm(stack: dict[str, Any], traffic: str, seconds: float) -> None:
    try:
        cost(stack, traffic, seconds)
    except RuntimeError:  # the quota's one request is admitted
        if traffic == "admitted":
            raise


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default=baseline(), help="commit or tag")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each run")
    options = parser.parse_args()
    try:
        with tree(options.base) as before:
            verdicts = guard(before, rounds=options.rounds, seconds=options.seconds)
    except UnavailableError as error:
        print(f"skipped: {error}")
        return
    for verdict in verdicts:
        print(verdict)
    sys.exit(1 if any(verdict.slower for verdict in verdicts) else 0)


if __name__ == "__main__":
    main()
