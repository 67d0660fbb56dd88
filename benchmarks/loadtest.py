"""`make load`: plays what customers do, and checks every decision against the plan and the ledger.

Brings up Valkey, Postgres, an upstream, a gateway with two workers and a reconciler; plays each
scenario of benchmarks/locustfile.py for a short time; prints latency percentiles and whether

- what was served is what was counted, for every key, live and in the ledger;
- a quota admitted exactly what it allows, and a rate limit nothing that it should not and refused
  nothing that it should not;
- customers within their limits were never refused, whatever their neighbours did;
- every refusal said when to come back and which limit it was.

Exit status: 0 all of that held, 1 it did not (the findings are printed), 2 Locust is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import findings
from benchmarks.stack import Cores, Stack, running
from benchmarks.stub_upstream import EVENT, EVENTS
from benchmarks.tools import MissingError, locust
from core.config import load
from core.db import connect_pool
from core.redis.store import Store
from core.usage import read_usage

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
BURST_RATE, BURST_SIZE = 20, 40
QUOTA = 100
_FLUSH_S = 30
_GRACE_S = 60

CONFIG = f"""
redis: {{{{url: "${{{{TALLYGATE_REDIS_URL}}}}", timeout: 5s}}}}
postgres: {{{{url: "${{{{TALLYGATE_POSTGRES_URL}}}}"}}}}
secrets: {{{{key_pepper: "${{{{TALLYGATE_KEY_PEPPER}}}}"}}}}
telemetry: {{{{metrics_dir: "${{{{TALLYGATE_METRICS_DIR}}}}"}}}}
upstreams:
  stub: {{{{urls: ["http://127.0.0.1:{{upstream}}"]}}}}
routes:
  - {{{{match: {{{{path: "/*"}}}}, upstream: stub, meters: {{{{requests: 1}}}}}}}}
plans:
  generous:
    limits:
      per_second: {{{{rate: 100_000/s, burst: 100_000}}}}
      per_day: {{{{window: 1d, limit: 1_000_000_000}}}}
      monthly: {{{{period: billing, limit: 1_000_000_000}}}}
  bursty:
    limits:
      per_second: {{{{rate: {BURST_RATE}/s, burst: {BURST_SIZE}}}}}
      monthly: {{{{period: billing, limit: 1_000_000_000}}}}
  small:
    limits:
      per_second: {{{{rate: 100_000/s, burst: 100_000}}}}
      monthly: {{{{period: billing, limit: {QUOTA}}}}}
log: {{{{level: warning}}}}
"""


@dataclass(frozen=True)
class Scenario:
    """A run of Locust: its user classes, and how many keys of which plan they have."""

    name: str
    classes: tuple[str, ...]
    users: int
    plan: str
    keys: int
    rate: float = 5
    path: str = "/1k"
    refusals: str = "none"  # none, any, exactly the quota, rate (every decision)
    quiet: int = 0  # keys of the generous plan that must not be refused


SCENARIOS = (
    Scenario("steady", ("Steady",), 40, "generous", 20),
    Scenario("burst", ("Burst",), 10, "bursty", 10, refusals="rate"),
    Scenario("exhaustion", ("Exhaustion",), 20, "small", 8, refusals="quota"),
    Scenario("noisy neighbour", ("Noisy", "Quiet"), 40, "bursty", 1, refusals="any", quiet=20),
    Scenario("many keys", ("ManyKeys",), 40, "generous", 400),
    Scenario("streaming", ("Streaming",), 40, "generous", 10, path="/stream"),
)


class Shares:
    """Keys of a plan, handed out once: what a scenario counts is not another's."""

    def __init__(self, keys: Mapping[str, Sequence[str]]) -> None:
        self._keys = {plan: list(found) for plan, found in keys.items()}

    def take(self, plan: str, count: int) -> list[str]:
        found, self._keys[plan] = self._keys[plan][:count], self._keys[plan][count:]
        return found


def needed(scenarios: Sequence[Scenario]) -> dict[str, int]:
    """Subscriptions by plan."""
    counts = dict.fromkeys(("generous", "bursty", "small"), 0)
    for each in scenarios:
        counts[each.plan] += each.keys
        counts["generous"] += each.quiet
    return counts


def play(stack: Stack, scenario: Scenario, keys: list[str], quiet: list[str], seconds: int) -> Any:
    """Runs Locust; what benchmarks/locustfile.py reports.

    Raises:
        RuntimeError: it wrote no report; the message ends with what it printed.
    """
    name = scenario.name.replace(" ", "-")
    files = {kind: stack.folder / f"{name}.{kind}" for kind in ("keys", "quiet", "json")}
    files["keys"].write_text("\n".join(keys))
    files["quiet"].write_text("\n".join(quiet))
    options = {
        "--host": f"http://127.0.0.1:{stack.gateway_port}",
        "--users": scenario.users,
        "--spawn-rate": scenario.users,
        "--run-time": f"{seconds}s",
        "--stop-timeout": 30,
        "--path": scenario.path,
        "--rate": scenario.rate,
        "--keys": files["keys"],
        "--quiet-keys": files["quiet"],
        "--stream-bytes": len(EVENT) * EVENTS,
        "--report": files["json"],
    }
    command = [str(locust()), "-m", "locust", "-f", str(LOCUSTFILE), *scenario.classes]
    command += ["--headless", "--only-summary", "--loglevel", "WARNING"]
    command += [str(word) for pair in options.items() for word in pair]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds + _GRACE_S
    )
    if not files["json"].exists():
        raise RuntimeError(f"Locust made no report:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(files["json"].read_text())


async def counted(stack: Stack, keys: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Requests counted for each key: live, and in the ledger alone once it has caught up."""
    snapshot = _snapshot(stack)
    database = await connect_pool(stack.postgres_url, size=2, timeout_s=10)
    store = Store.connect(stack.valkey_url, 5)
    nowhere = Store.connect("redis://127.0.0.1:1/0", 0.5)  # the ledger answers alone
    live, ledger = {}, {}
    try:
        for key in keys:
            subscription = stack.subscriptions[key]
            deadline = time.monotonic() + _FLUSH_S
            usage = await read_usage(database, store, snapshot, subscription)
            while usage.lag.unflushed and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
                usage = await read_usage(database, store, snapshot, subscription)
            live[key] = _requests(usage)
            ledger[key] = _requests(await read_usage(database, nowhere, snapshot, subscription))
    finally:
        await store.close()
        await nowhere.close()
        await database.close()
    return live, ledger


def _snapshot(stack: Stack) -> Any:
    return load(stack.config, env=stack.environment)


def _requests(usage: Any) -> int:
    return int(sum((each.total for each in usage.meters if each.meter == "requests"), Decimal(0)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loadtest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [each.name for each in SCENARIOS]
    parser.add_argument("--scenarios", default=",".join(names), help=", ".join(names))
    parser.add_argument("--seconds", type=int, default=8, help="of each scenario")
    parser.add_argument("--workers", type=int, default=2, help="of the gateway")
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.scenarios.split(",")]
    if unknown := set(wanted) - set(names):
        parser.error(f"no scenario {', '.join(unknown)}")
    try:
        locust()
    except MissingError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    results = run([each for each in SCENARIOS if each.name in wanted], options)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    sys.exit(1 if any(each["findings"] for each in results) else 0)


def run(scenarios: Sequence[Scenario], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each scenario in turn, on one stack: its groups, requests by status, and findings."""
    everywhere = Cores(*[f"0-{max(Cores.count() - 1, 0)}"] * 5)
    console = Console(stderr=True)
    results = []
    with (
        console.status("starting") as status,
        running(
            appendfsync=options.appendfsync,
            subscriptions=needed(scenarios),
            config=CONFIG,
            workers=options.workers,
            cores=everywhere,
            reconciler=True,
        ) as stack,
    ):
        shares = Shares(stack.keys)
        for scenario in scenarios:
            status.update(f"{scenario.name}, {options.seconds} s")
            keys = shares.take(scenario.plan, scenario.keys)
            quiet = shares.take("generous", scenario.quiet)
            report = play(stack, scenario, keys, quiet, options.seconds)
            live, ledger = asyncio.run(counted(stack, keys + quiet))
            found = findings(
                report, live, ledger, kind=scenario.refusals, quota=QUOTA,
                rate=BURST_RATE, burst=BURST_SIZE, quiet=quiet,
            )  # fmt: skip
            results.append({
                "scenario": scenario.name, "groups": report["groups"], "findings": found,
                "counted": sum(live.values()), "ledger": sum(ledger.values()),
            })  # fmt: skip
    return results


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """The table, and below it what is wrong."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = Table(title="Latency in ms; of paced users from when each request was due")
    titles = ("group", "200", "429", "other", "p50", "p90", "p99", "max", "counted", "ledger")
    for title in titles:
        table.add_column(title, justify="left" if title == "group" else "right")
    table.add_column("as planned")
    for result in results:
        for number, (name, group) in enumerate(result["groups"].items()):
            statuses, latency = dict(group["statuses"]), group["latency_ms"]
            admitted, refused = statuses.pop("200", 0), statuses.pop("429", 0)
            cells = [f"{latency[each]:.1f}" for each in ("p50", "p90", "p99", "max")]
            counts = [f"{each:,}" for each in (admitted, refused, sum(statuses.values()))]
            last = [f"{result['counted']:,}", f"{result['ledger']:,}"]
            verdict = "no" if result["findings"] else "yes"
            ending = [*last, verdict] if number == 0 else ["", "", ""]
            table.add_row(name, *(counts if group["statuses"] else ["", "", ""]), *cells, *ending)
        table.add_section()
    console.print(table)
    for result in results:
        for finding in result["findings"]:
            console.print(f"{result['scenario']}: {finding}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
