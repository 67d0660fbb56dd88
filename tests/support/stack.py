"""A whole Tallygate as real processes on free ports: stores, upstream, gateways, reconciler."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.support.processes import Process, run_module
from tests.support.wait import free_port, wait_until

if TYPE_CHECKING:
    import httpx
    import redis

    from cli.embedded import EmbeddedValkey

PEPPER = "a pepper for tests, longer than thirty-two characters"
_BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Subscriber:
    """A subscription with one key; `key` is the secret."""

    id: str
    key: str
    key_id: str


@dataclass(frozen=True)
class Use:
    """A meter's total and the part of it beyond the limit."""

    total: Decimal
    overage: Decimal = Decimal(0)


class Stack:
    """Made by `start_stack`. Gateway n listens on `ports[n]`; `gateways[n]` is its supervisor."""

    def __init__(self, config: Path, env: Mapping[str, str], valkey: EmbeddedValkey) -> None:
        import httpx
        import redis

        self.config = config
        self.env = env
        self.valkey = valkey
        self.ports: list[int] = []
        self.gateways: list[Process] = []
        self.reconcilers: list[Process] = []
        self.upstream: Process | None = None
        self.upstream_port = 0
        self.upstream_journal: Path | None = None
        self.redis: redis.Redis[bytes] = redis.Redis.from_url(valkey.url)
        self._http = httpx.Client(
            timeout=30,
            trust_env=False,
            verify=False,  # plain HTTP: saves loading the certificates of the machine
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._runner = asyncio.Runner()
        self._database: Any = None
        self._customer = ""

    # Processes

    @property
    def reconciler(self) -> Process | None:
        return self.reconcilers[0] if self.reconcilers else None

    def start_gateway(self, workers: int, number: int | None = None) -> Process:
        """A new gateway on a port of its own, or `number` once more, which has ended."""
        if number is None:
            self.ports.append(free_port())
        port = self.ports[-1 if number is None else number]
        process = run_module(
            "gateway",
            *("--config", str(self.config)),
            *("--listen", f"127.0.0.1:{port}"),
            *("--workers", str(workers)),
            env=self.env,
        )
        return self._keep(self.gateways, process, number)

    def start_reconciler(self, number: int | None = None) -> Process:
        """Another reconciler, or `number` once more, which has ended."""
        process = run_module("reconciler", "--config", str(self.config), env=self.env)
        return self._keep(self.reconcilers, process, number)

    def start_upstream(self) -> Process:
        """The upstream, or the upstream once more, which has ended."""
        journal = [str(self.upstream_journal)] if self.upstream_journal else []
        process = run_module("tests.support.upstream", str(self.upstream_port), *journal)
        if self.upstream is not None:
            self.upstream.__exit__(None, None, None)
        self.upstream = process
        return process

    @staticmethod
    def _keep(kept: list[Process], process: Process, number: int | None) -> Process:
        if number is None:
            kept.append(process)
        else:
            kept[number].__exit__(None, None, None)
            kept[number] = process
        return process

    def stop_processes(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends gateways, reconcilers and upstream; prints what they said when there is an error."""
        upstream = [self.upstream] if self.upstream is not None else []
        for process in [*self.reconcilers, *self.gateways, *upstream]:
            process.__exit__(kind, error, trace)

    def url(self, path: str, gateway: int = 0) -> str:
        return f"http://127.0.0.1:{self.ports[gateway]}{path}"

    def get(self, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        """One request on a connection of its own."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= more.pop("headers", {})
        url = self.url(path, more.pop("gateway", 0))
        return self._http.request(more.pop("method", "GET"), url, headers=headers, **more)

    def write_config(self, text: str) -> None:
        """Replaces the file in one step, as a careful editor does."""
        draft = self.config.with_suffix(".new")
        draft.write_text(text)
        draft.replace(self.config)

    # Directory

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    async def database(self) -> Any:
        if self._database is None:
            from core.db import connect_pool

            self._database = await connect_pool(
                self.env["TALLYGATE_POSTGRES_URL"], size=2, timeout_s=10
            )
        return self._database

    def subscribe(self, plan: str, status: str = "active") -> Subscriber:
        """A new subscription of one customer of one creator, with a key."""
        from core import directory
        from core.secrets import KeyHasher

        async def create() -> Subscriber:
            database = await self.database()
            if not self._customer:
                creator = await directory.create_creator(
                    database, name="Creator", email="creator@example.com"
                )
                customer = await directory.create_customer(
                    database, creator_id=creator.id, name="Customer", email="c@example.com"
                )
                self._customer = customer.id
            subscription = await directory.create_subscription(
                database, customer_id=self._customer, plan=plan, status=status
            )
            key = await directory.create_key(
                database, KeyHasher(PEPPER), subscription_id=subscription.id
            )
            return Subscriber(subscription.id, key.secret, key.key.id)

        subscriber: Subscriber = self.run(create())
        return subscriber

    def directory(self, function: str, *args: Any, **more: Any) -> Any:
        """Calls a function of `core.directory` by name."""
        from core import directory

        async def call() -> Any:
            return await getattr(directory, function)(await self.database(), *args, **more)

        return self.run(call())

    # What was counted

    def hash(self, subscriber: Subscriber) -> dict[bytes, bytes]:
        """The whole live state, as it is in Redis."""
        from core.keyspace import Keyspace

        return self.redis.hgetall(Keyspace().state(subscriber.id))

    def state(self, subscriber: Subscriber) -> dict[str, Use]:
        """Totals of the billing period in Redis, by meter."""
        return self._totals(subscriber, self.hash(subscriber))

    def wipe(self, subscriber: Subscriber) -> dict[str, Use]:
        """FLUSHALL; returns the subscriber's totals of that very moment."""
        from core.keyspace import Keyspace

        with self.redis.pipeline(transaction=True) as transaction:
            transaction.hgetall(Keyspace().state(subscriber.id))
            transaction.flushall()
            fields, _ = transaction.execute()
        return self._totals(subscriber, fields)

    @staticmethod
    def _totals(subscriber: Subscriber, fields: Mapping[bytes, bytes]) -> dict[str, Use]:
        from core.keyspace import Keyspace
        from reconciler.snapshot import read_state

        if not fields:
            return {}
        texts = {name.decode(): text.decode() for name, text in fields.items()}
        rows = read_state(Keyspace().state(subscriber.id), texts).periods
        return {row.meter: Use(Decimal(row.total), Decimal(row.overage)) for row in rows}

    def leases(self, subscriber: Subscriber, limit: str) -> int:
        """Slots of a concurrency limit that are in use or not yet swept."""
        from core.keyspace import Keyspace

        return int(self.redis.zcard(Keyspace().leases(subscriber.id, limit)))

    def _rows(self, query: str, *args: Any) -> Any:
        async def fetch() -> Any:
            return await (await self.database()).fetch(query, *args)

        return self.run(fetch())

    def ledger(self, subscriber: Subscriber) -> dict[str, Use]:
        """Totals of the one billing period in Postgres, by meter."""
        rows = self._rows("ledger_of_subject", subscriber.id, 100)
        found = {row["meter"]: Use(row["total"], row["overage"]) for row in rows}
        assert len(found) == len(rows), f"more than one period: {rows}"
        return found

    def ledger_hours(self, subscriber: Subscriber) -> dict[str, Use]:
        """The sums of all hours in Postgres, by meter."""
        end = datetime(2100, 1, 1, tzinfo=UTC)
        found: dict[str, Use] = {}
        for row in self._rows("hours_of_subject", subscriber.id, _BEGINNING, end):
            use = found.get(row["meter"], Use(Decimal(0)))
            found[row["meter"]] = Use(use.total + row["total"], use.overage + row["overage"])
        return found

    def flushed(self, subscriber: Subscriber, requests: int) -> None:
        """Waits until the ledger says so many requests."""
        wait_until(
            lambda: (
                self.ledger(subscriber).get("requests") is not None
                and self.ledger(subscriber)["requests"].total == requests
            ),
            what=f"{requests} requests in the ledger of {subscriber.id}",
        )

    def quiet(self) -> None:
        """Waits until everything that was counted, and every event, is in Postgres."""
        from core.keyspace import Keyspace

        keys = Keyspace()
        wait_until(
            lambda: self.redis.zcard(keys.dirty(0)) == 0 and self.redis.xlen(keys.events(0)) == 0,
            what="everything flushed",
        )

    def events(self, subscriber: Subscriber) -> list[tuple[str, str, int]]:
        """Limit events in Postgres, in order: limit, kind, threshold."""
        rows = self._rows("events_of_subject", subscriber.id, _BEGINNING)
        return [(row["limit_name"], row["kind"], row["threshold"]) for row in rows]

    def stream(self, subscriber: Subscriber) -> list[tuple[str, str, int]]:
        """Limit events still in Redis, in order; 101 stands for "above the limit"."""
        from core.keyspace import Keyspace

        keys = Keyspace()
        mine = keys.state(subscriber.id).encode()
        return [
            (fields[b"limit"].decode(), fields[b"kind"].decode(), int(fields[b"threshold"]))
            for _, fields in self.redis.xrange(keys.events(0))
            if fields[b"key"] == mine
        ]

    # The upstream

    def seen(self) -> dict[str, Any]:
        """What the upstream says it served: see tests/support/upstream.py."""
        url = f"http://127.0.0.1:{self.upstream_port}/-/seen"
        answer: dict[str, Any] = self._http.get(url).json()
        return answer

    def served(self, who: str, path: str | None = None) -> int:
        """Requests that reached the upstream under this X-Who, on one path or all."""
        return sum(
            count
            for name, count in self.seen()["served"].items()
            if name.split(" ")[0] == who and path in (None, name.split(" ")[1])
        )

    def release(self) -> None:
        """Lets the upstream answer what it holds."""
        self._http.get(f"http://127.0.0.1:{self.upstream_port}/-/release")

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all processes of a metric's series that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        from core.telemetry.exposition import render

        page = render(Path(self.env["TALLYGATE_METRICS_DIR"])).decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def close(self) -> None:
        self.redis.close()
        self._http.close()
        if self._database is not None:
            with contextlib.suppress(Exception):
                self.run(self._database.close())
        self._runner.close()


@contextmanager
def start_stack(
    directory: Path,
    config: str,
    postgres_url: str,
    *,
    gateways: Sequence[int] = (1,),
    reconcilers: int = 1,
    journal: bool = False,
) -> Iterator[Stack]:
    """Everything but Postgres (a migrated database), ready to serve.

    Args:
        directory: empty; for Valkey's files, the configuration and the metrics.
        config: YAML; `${UPSTREAM}` is the upstream's URL, the stores are filled in.
        gateways: workers of each gateway process.
        reconcilers: how many of them.
        journal: the upstream writes down every request, in `upstream_journal`.
    """
    from cli.embedded import EmbeddedValkey

    with ExitStack() as stop:
        valkey = EmbeddedValkey(directory / "valkey", port=free_port(), appendfsync="always")
        stop.enter_context(valkey)
        upstream_port = free_port()
        env = {
            "TALLYGATE_REDIS_URL": valkey.url,
            "TALLYGATE_POSTGRES_URL": postgres_url,
            "TALLYGATE_KEY_PEPPER": PEPPER,
            "TALLYGATE_METRICS_DIR": str(directory / "metrics"),
            "UPSTREAM": f"http://127.0.0.1:{upstream_port}",
        }
        path = directory / "config.yaml"
        path.write_text(config)
        stack = Stack(path, env, valkey)
        stop.callback(stack.close)
        stop.push(stack.stop_processes)
        stack.upstream_port = upstream_port
        stack.upstream_journal = directory / "upstream.journal" if journal else None
        upstream = stack.start_upstream()
        for workers in gateways:
            stack.start_gateway(workers)
        for _ in range(reconcilers):
            stack.start_reconciler()
        upstream.wait_for_http(f"http://127.0.0.1:{upstream_port}/-/seen")
        for process, port in zip(stack.gateways, stack.ports, strict=True):
            process.wait_for_http(f"http://127.0.0.1:{port}/-/readyz")
        yield stack
