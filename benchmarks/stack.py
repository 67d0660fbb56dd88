"""Brings up what is measured: embedded stores, stub upstream, gateway; pinned where possible."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.embedded import EmbeddedPostgres, EmbeddedValkey, free_port
from core.db import connect_pool, migrate
from core.directory import create_creator, create_customer, create_key, create_subscription
from core.secrets import KeyHasher

PEPPER = "benchmark-pepper-of-no-value-elsewhere"

# High enough that nothing is refused: what is measured is the cost of deciding.
CONFIG = """
# A shared machine's disk may stall for longer than the default of 50 ms.
redis: {{url: "${{TALLYGATE_REDIS_URL}}", timeout: 2s}}
postgres: {{url: "${{TALLYGATE_POSTGRES_URL}}"}}
secrets: {{key_pepper: "${{TALLYGATE_KEY_PEPPER}}"}}
telemetry: {{metrics_dir: "${{TALLYGATE_METRICS_DIR}}"}}
upstreams:
  stub: {{urls: ["http://127.0.0.1:{upstream}"]}}
routes:
  - {{match: {{path: "/*"}}, upstream: stub, meters: {{requests: 1}}}}
plans:
  four_limits:
    limits:
      per_second: {{rate: 1_000_000/s, burst: 1_000_000}}
      per_hour: {{window: 1h, limit: 1_000_000_000, sliding: true}}
      per_day: {{window: 1d, limit: 10_000_000_000}}
      monthly: {{period: billing, limit: 10_000_000_000}}
  demo:
    limits:
      per_second: {{rate: 1_000_000/s, burst: 1_000_000}}
      in_flight: {{concurrency: 1_000_000}}
      per_day: {{window: 1d, limit: 10_000_000_000}}
      monthly: {{period: billing, limit: 10_000_000_000, action: overage}}
  exhausted:
    limits:
      per_second: {{rate: 1_000_000/s, burst: 1_000_000}}
      per_hour: {{window: 1h, limit: 1_000_000_000, sliding: true}}
      per_day: {{window: 1d, limit: 10_000_000_000}}
      monthly: {{period: billing, limit: 1}}
  unlimited: {{unlimited: true}}
log: {{level: warning}}
"""

PLANS = ("four_limits", "demo", "exhausted", "unlimited")


@dataclass
class Stack:
    """Ports and process ids of a running stack; `keys` by plan."""

    gateway_port: int
    upstream_port: int
    gateway_pids: list[int]
    valkey_pid: int
    valkey_url: str
    keys: dict[str, list[str]]


def pinned(core: int, command: list[str]) -> list[str]:
    """The command on one core, where the machine has more than one and `taskset` exists."""
    if (os.cpu_count() or 1) < 2 or not Path("/usr/bin/taskset").exists():
        return command
    return ["taskset", "-c", str(core), *command]


def _wait(url: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


async def _prepare(url: str, count: int) -> dict[str, list[str]]:
    await migrate(url)
    database = await connect_pool(url, size=4, timeout_s=10)
    hasher = KeyHasher(PEPPER)
    creator = await create_creator(database, name="bench", email="bench@example.com")
    customer = await create_customer(
        database, creator_id=creator.id, name="bench", email="bench@example.com"
    )
    keys: dict[str, list[str]] = {plan: [] for plan in PLANS}
    for plan in PLANS:
        for _ in range(count):
            subscription = await create_subscription(database, customer_id=customer.id, plan=plan)
            new = await create_key(database, hasher, subscription_id=subscription.id)
            keys[plan].append(new.secret)
    await database.close()
    return keys


@contextmanager
def running(*, appendfsync: str, subscriptions: int, workers: int = 1) -> Iterator[Stack]:
    """A stack that lasts as long as the context; the gateway on core 0, all else on core 1."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.chmod(0o711)
        valkey = stack.enter_context(EmbeddedValkey(folder / "v", appendfsync=appendfsync))
        postgres = stack.enter_context(EmbeddedPostgres(folder / "p"))
        subprocess.run(["taskset", "-cp", "1", str(valkey.pid)], check=False, capture_output=True)
        keys = asyncio.run(_prepare(postgres.url, subscriptions))
        upstream, gateway = free_port(), free_port()
        config = folder / "config.yaml"
        config.write_text(CONFIG.format(upstream=upstream))
        environment = os.environ | {
            "TALLYGATE_REDIS_URL": valkey.url,
            "TALLYGATE_POSTGRES_URL": postgres.url,
            "TALLYGATE_KEY_PEPPER": PEPPER,
            "TALLYGATE_METRICS_DIR": str(folder / "metrics"),
        }

        def start(core: int, *arguments: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                pinned(core, [sys.executable, "-m", *arguments]), env=environment
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process

        start(1, "benchmarks.stub_upstream", "--port", str(upstream))
        process = start(
            0,
            *("gateway", "--config", str(config), "--workers", str(workers)),
            *("--listen", f"127.0.0.1:{gateway}"),
        )
        _wait(f"http://127.0.0.1:{gateway}/-/readyz")
        yield Stack(gateway, upstream, _children(process.pid), valkey.pid or 0, valkey.url, keys)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
