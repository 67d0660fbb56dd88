"""Brings up what is measured: embedded stores, an upstream, gateways; pinned where possible."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks import interpreter
from benchmarks.processes import children, pin, pinned, start, wait_ready
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


@dataclass(frozen=True)
class Cores:
    """Which cores do what. With two, the gateway has one and everything else the other."""

    gateway: str
    second: str  # of a second worker
    redis: str
    upstream: str
    client: str

    @classmethod
    def of_machine(cls) -> Cores:
        if cls.count() >= 4:
            return cls(gateway="0", second="1", redis="2", upstream="3", client="3")
        return cls(gateway="0", second="1", redis="1", upstream="1", client="1")

    @staticmethod
    def count() -> int:
        """Cores of this machine."""
        return os.cpu_count() or 1

    @property
    def apart(self) -> bool:
        """A second worker has a core of its own."""
        return self.second != self.redis


@dataclass
class Stack:
    """Ports and process ids of a running stack; `keys` by plan, `subscriptions` by key."""

    folder: Path
    upstream_port: int
    valkey_pid: int
    valkey_url: str
    postgres_url: str
    keys: dict[str, list[str]]
    subscriptions: dict[str, str]
    config: Path
    environment: dict[str, str]
    python: Path
    cores: Cores
    cleanup: ExitStack
    gateway_port: int = 0
    gateway_pids: list[int] = field(default_factory=list)
    reconciler_pid: int = 0

    def start_gateway(self, workers: int = 1, cores: str | None = None) -> tuple[int, list[int]]:
        """One more gateway on the same stores: its port and the ids of its workers."""
        port = free_port()
        process = self.start(
            cores or self.cores.gateway,
            *("gateway", "--config", str(self.config), "--workers", str(workers)),
            *("--listen", f"127.0.0.1:{port}"),
            log=(log := self._log("gateway")),
        )
        wait_ready(f"http://127.0.0.1:{port}/-/readyz", log=log)
        return port, children(process.pid)

    def start(self, cores: str, *module: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        """`python -m <module>` on these cores, with the stack's environment, until its end."""
        command = pinned(cores, [str(self.python), "-m", *module])
        return start(self.cleanup, command, env=self.environment, log=log or self._log(module[0]))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}-{free_port()}.log"


async def _prepare(
    url: str, counts: Mapping[str, int]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    await migrate(url)
    database = await connect_pool(url, size=4, timeout_s=10)
    hasher = KeyHasher(PEPPER)
    creator = await create_creator(database, name="bench", email="bench@example.com")
    customer = await create_customer(
        database, creator_id=creator.id, name="bench", email="bench@example.com"
    )
    keys: dict[str, list[str]] = {plan: [] for plan in counts}
    subscriptions: dict[str, str] = {}
    for plan, count in counts.items():
        for _ in range(count):
            subscription = await create_subscription(database, customer_id=customer.id, plan=plan)
            new = await create_key(database, hasher, subscription_id=subscription.id)
            keys[plan].append(new.secret)
            subscriptions[new.secret] = subscription.id
    await database.close()
    return keys, subscriptions


@contextmanager
def running(
    *,
    appendfsync: Literal["always", "everysec"],
    subscriptions: int | Mapping[str, int],
    config: str = CONFIG,
    workers: int = 1,
    cores: Cores | None = None,
    upstream_port: int | None = None,
    reconciler: bool = False,
    redis: Path | None = None,
    python: Path | None = None,
) -> Iterator[Stack]:
    """A stack that lasts as long as the context.

    Args:
        appendfsync: of the Redis server, which may be switched while it runs.
        subscriptions: how many for each plan, one key each; by plan, where `config` has others.
        config: the configuration; `{upstream}` in it is the upstream's port.
        workers: of the gateway.
        cores: what runs where; as fits the machine by default.
        upstream_port: an upstream that is there already; without it, the stub is started.
        reconciler: run one, as in production.
        redis: another server binary than the embedded Valkey.
        python: another interpreter of the same version than this one.
    """
    cores = cores or Cores.of_machine()
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        folder.chmod(0o711)
        valkey = cleanup.enter_context(
            EmbeddedValkey(folder / "v", appendfsync=appendfsync, binary=redis)
        )
        postgres = cleanup.enter_context(EmbeddedPostgres(folder / "p"))
        assert valkey.pid is not None
        pin(valkey.pid, cores.redis)
        if isinstance(subscriptions, int):
            subscriptions = dict.fromkeys(PLANS, subscriptions)
        keys, by_key = asyncio.run(_prepare(postgres.url, subscriptions))
        upstream = upstream_port or free_port()
        file = folder / "config.yaml"
        file.write_text(config.format(upstream=upstream))
        python = python or Path(sys.executable)
        environment = os.environ | interpreter.environment(python)
        environment |= {
            "TALLYGATE_REDIS_URL": valkey.url,
            "TALLYGATE_POSTGRES_URL": postgres.url,
            "TALLYGATE_KEY_PEPPER": PEPPER,
            "TALLYGATE_METRICS_DIR": str(folder / "metrics"),
        }
        stack = Stack(
            folder=folder,
            upstream_port=upstream,
            valkey_pid=valkey.pid,
            valkey_url=valkey.url,
            postgres_url=postgres.url,
            keys=keys,
            subscriptions=by_key,
            config=file,
            environment=environment,
            python=python,
            cores=cores,
            cleanup=cleanup,
        )
        if upstream_port is None:
            stack.start(cores.upstream, "benchmarks.stub_upstream", "--port", str(upstream))
        if reconciler:
            process = stack.start(cores.redis, "reconciler", "--config", str(file))
            stack.reconciler_pid = process.pid
        stack.gateway_port, stack.gateway_pids = stack.start_gateway(workers)
        yield stack
