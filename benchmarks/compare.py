"""`make bench`, `python -m benchmarks.compare`: Tallygate next to what else one would take.

Same upstream, same client, same customers, same Redis server, one run: Tallygate (key, four limits,
metering), Traefik with one limit in Redis, nginx with a Lua script and one INCR, Envoy without any
limit, and the upstream direct. Each gateway has one core to itself; everything else shares the
other (with four cores or more: one each). In every round each scenario is run with each peer, one
right after the other, in an order that turns; medians over the rounds are printed, and written to
benchmarks/results with a chart. What is not installed is left out.

Without a selection each scenario differs from the main one (64 connections, 1 KiB, admitted,
appendfsync always, 64 customers) in one thing; `--full` takes all combinations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import idle, interpreter, latency, report, scaling, soak
from benchmarks.closedloop import client, closed_loop
from benchmarks.peers import SIZES, Peer, Site, Start, envoy, nginx, traefik
from benchmarks.processes import rss_mib, total_cpu_us
from benchmarks.stack import Stack, running
from benchmarks.tools import MissingError

CUSTOMERS = 64
STARTS: dict[str, Start] = {
    "traefik": traefik.limiter,
    "traefik-fast": traefik.fast,
    "nginx": nginx.limiter,
    "envoy": envoy.bare,
}
NAMES = ("direct", "tallygate", *STARTS)
USUAL = [name for name in NAMES if name != "traefik-fast"]


@dataclass(frozen=True)
class Scenario:
    """What is the same for all peers of one comparison."""

    connections: int = 64
    size: int = 1  # KiB of the upstream's answer
    rejected: bool = False
    appendfsync: Literal["always", "everysec"] = "always"
    customers: int = CUSTOMERS

    @property
    def title(self) -> str:
        parts = [f"{self.connections} conn", f"{self.size} KiB"]
        parts[1:] = ["rejected"] if self.rejected else parts[1:]
        parts += [self.appendfsync] if self.appendfsync != "always" else []
        parts += ["1 customer"] if self.customers == 1 else []
        return ", ".join(parts)

    def takes(self, peer: Peer) -> bool:
        """Whether the scenario tells anything of this peer that another did not."""
        redis_only = self.appendfsync != "always" or self.customers != CUSTOMERS
        if self.rejected and not peer.limits:
            return False
        return peer.uses_redis or not redis_only


MAIN = Scenario()
DEFAULT = (
    MAIN,
    Scenario(rejected=True),
    Scenario(connections=1),
    Scenario(connections=512),
    Scenario(size=64),
    Scenario(customers=1),
    Scenario(appendfsync="everysec"),
    Scenario(rejected=True, appendfsync="everysec"),
)
QUICK = (MAIN, Scenario(rejected=True))

Run = dict[str, float]
Runs = dict[Scenario, dict[str, list[Run]]]


@contextmanager
def site(
    names: Sequence[str], redis_binary: Path | None = None, python: Path | None = None
) -> Iterator[tuple[Stack, list[Peer]]]:
    """Stores, upstream and all peers, running; idle ones cost nothing."""
    with ExitStack() as cleanup:
        stores = cleanup.enter_context(running_stack(redis_binary, python))
        peers = []
        if "direct" in names:
            port = stores.upstream_port
            peers.append(Peer("direct", "direct", port, [], limits=False, uses_redis=False))
        if "tallygate" in names:
            peers.append(tallygate(stores))
        for name, start in STARTS.items():
            if name not in names:
                continue
            folder = stores.folder / name
            folder.mkdir()
            try:
                peers.append(start(Site(stores, folder, cleanup)))
            except MissingError as error:
                print(f"without {name}: {error}", file=sys.stderr)
        yield stores, peers


@contextmanager
def running_stack(redis_binary: Path | None, python: Path | None) -> Iterator[Stack]:
    """The stack with nginx as its upstream, where there is one, and a reconciler."""
    with ExitStack() as cleanup:
        port, folder = None, cleanup.enter_context(report.folder())
        try:
            cores = report.CORES
            port = nginx.upstream(cleanup, folder, cores.upstream)
        except MissingError as error:
            print(f"the upstream is ours in Python: {error}", file=sys.stderr)
        yield cleanup.enter_context(
            running(
                appendfsync="always",
                subscriptions=CUSTOMERS,
                upstream_port=port,
                reconciler=True,
                redis=redis_binary,
                python=python,
            )
        )


def tallygate(stack: Stack) -> Peer:
    """The gateway of the stack: one worker; four limits and metering."""
    return Peer(
        "tallygate",
        "Tallygate",
        stack.gateway_port,
        stack.gateway_pids,
        admitted=tuple(stack.keys["four_limits"]),
        rejected=tuple(stack.keys["exhausted"]),
    )


def measure(stack: Stack, peer: Peer, scenario: Scenario, seconds: int) -> Run:
    """One run. CPU in µs per request, memory in MiB, latency in µs; `core` is the share of its
    core that the gateway used."""
    target = peer.target(rejected=scenario.rejected, size=scenario.size, keys=scenario.customers)
    stores = [stack.valkey_pid]
    background = [stack.reconciler_pid] if peer.name == "tallygate" else []
    before = [total_cpu_us(pids) for pids in (peer.pids, stores, background)]
    found = closed_loop(target, scenario.connections, seconds, stack.cores.client)
    after = [total_cpu_us(pids) for pids in (peer.pids, stores, background)]
    requests = max(found["requests"], 1)
    gateway, store, reconciler = ((b - a) / requests for a, b in zip(before, after, strict=True))
    store = store if peer.uses_redis else 0.0
    refused = found["refused"]
    wrong = requests - refused if scenario.rejected else refused
    return {
        "rps": requests / found["seconds"],
        **{name: found[name] for name in ("p50_us", "p90_us", "p99_us", "p999_us")},
        "gateway_us": gateway,
        "redis_us": store,
        "total_us": gateway + store,
        "reconciler_us": reconciler,
        "core": gateway * requests / found["seconds"] / 1e6,
        "errors": found["errors"] + wrong,
        "rss_mib": sum(map(rss_mib, peer.pids)),
    }


def compare(
    stack: Stack, peers: list[Peer], scenarios: Sequence[Scenario], rounds: int, seconds: int
) -> Runs:
    """All rounds; the one before the first, short, warms up and is not counted."""
    runs: Runs = {each: {p.name: [] for p in peers if each.takes(p)} for each in scenarios}
    total = (rounds + 1) * sum(map(len, runs.values()))
    server = redis.Redis.from_url(stack.valkey_url)
    columns = TextColumn("{task.description:<44}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        for number in range(rounds + 1):
            for scenario in scenarios:
                server.config_set("appendfsync", scenario.appendfsync)
                turn = number % len(peers)
                for peer in peers[turn:] + peers[:turn]:
                    if not scenario.takes(peer):
                        continue
                    text = f"round {number}/{rounds}  {peer.name}  {scenario.title}"
                    progress.update(task, description=text)
                    run = measure(stack, peer, scenario, seconds if number else 1)
                    if number:
                        runs[scenario][peer.name].append(run)
                    progress.advance(task)
        server.config_set("appendfsync", "always")
    server.close()
    return runs


def chosen(options: argparse.Namespace) -> tuple[Scenario, ...]:
    """The scenarios of the command line."""
    given = (
        options.connections,
        options.sizes,
        [each == "rejected" for each in options.traffic or []],
        options.appendfsync,
        options.customers,
    )
    if options.full:
        given = [1, 64, 512], list(SIZES), [False, True], ["always", "everysec"], [CUSTOMERS, 1]
    elif not any(given):
        return QUICK if options.quick else DEFAULT
    usual = [[value] for value in asdict(MAIN).values()]
    values = [some or one for some, one in zip(given, usual, strict=True)]
    found = [Scenario(*each) for each in product(*values)]
    # a refusal has no upstream, so no size
    return tuple(each for each in found if not each.rejected or each.size == found[0].size)


def medians(runs: list[Run]) -> Run:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _peers(text: str) -> list[str]:
    names = _words(text)
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; of {', '.join(NAMES)}")
    return names


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two scenarios, five rounds of a second, no extras")
    add("--full", action="store_true", help="all combinations: the better part of an hour")
    add("--peers", type=_peers, default=USUAL, help=f"{','.join(NAMES)}; without traefik-fast")
    add("--connections", type=_numbers, help="1,64,512")
    add("--sizes", type=_numbers, help="KiB of an answer: 1,64")
    add("--traffic", type=_words, help="admitted,rejected")
    add("--appendfsync", type=_words, help="always,everysec")
    add("--customers", type=_numbers, help="1,64")
    add("--rounds", type=int, default=5)
    add("--seconds", type=int, help="of each run: 2, with --quick 1")
    add("--redis", type=Path, help="another server binary than the embedded Valkey")
    add("--soak", type=float, metavar="SECONDS", help="load it so long and fit its memory: 600")
    add(
        "--python",
        default="auto",
        help="interpreter of the gateway, of this one's version; auto: "
        "the system's where that is a faster build",
    )
    add("--no-extras", action="store_true", help="no fixed rate, no scaling, no idle connections")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the result as JSON")
    form.add_argument("--markdown", action="store_true", help="print it for a page")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    add("--page", type=Path, help="put the tables between the marks of this Markdown file")
    add("--chart", type=Path, help="write the chart to this file as well")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    scenarios = chosen(options)
    seconds = options.seconds or (1 if options.quick else 2)
    load = os.getloadavg()[0]
    python = interpreter.choose(options.python)
    with site(options.peers, options.redis, python) as (stack, peers):
        runs = compare(stack, peers, scenarios, options.rounds, seconds)
        result = report.collect(options, peers, runs)
        result["load"] = load
        result["python"] = interpreter.describe(python)
        result["client"] = "wrk" if client() else "benchmarks.client"
        if not (options.quick or options.no_extras):
            result |= extras(stack, peers, result, options.rounds)
        if options.soak:
            say(f"{options.soak:.0f} s of load")
            result["soak"] = soak.soak(stack, options.soak)
    result["targets"] = report.targets(result)
    report.write(result, options.output, options.chart)
    if options.page:
        report.replace(options.page, report.markdown(result))
    if options.json:
        report.print_json(result)
    elif options.markdown:
        print(report.markdown(result), end="")
    else:
        report.print_tables(result)


def extras(stack: Stack, peers: list[Peer], result: report.Result, rounds: int) -> report.Result:
    """What needs another client, or another gateway, on the same stores."""
    own = [peer for peer in peers if peer.name == "tallygate"]
    if not own:
        return {}
    found: report.Result = {}
    if saturation := report.median_of(result, MAIN.title, "tallygate", "rps"):
        say("latency at a fixed rate")
        found["latency"] = latency.at_rate(stack, peers, saturation / 2, rounds)
    say("two workers")
    found["scaling"] = scaling.scale(stack, rounds)
    say("idle connections")
    found["idle"] = idle.idle(stack)
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
