"""Locust scenarios for a gateway: your own, or the one that `make load` brings up.

    locust -f benchmarks/locustfile.py Steady --headless --users 20 --spawn-rate 20 --run-time 60s \
      --stop-timeout 30 --host http://gateway:8080 --path /weather/current --keys keys.txt

`--keys` is a file of API keys, one a line: users share them out among themselves. `--report` writes
what was counted, by key, for a comparison with `tallygate usage`. How to choose the numbers and to
read the result: docs/benchmark-your-deployment.md.

Every refusal is checked for what a client needs of it: Retry-After and a problem that names the
limit. Latency of paced users counts from when a request was due, not from when it could be sent.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from locust import FastHttpUser, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Book:
    """What the users of this process saw, by group of users and by key."""

    def __init__(self) -> None:
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.statuses: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_key: dict[str, Counter[str]] = defaultdict(Counter)
        self.decisions: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
        self.wrong: Counter[str] = Counter()

    def report(self) -> dict[str, Any]:
        """Latencies in milliseconds; `decisions` are (sent, answered, admitted) in seconds."""
        return {
            "groups": {
                name: {"statuses": self.statuses[name], "latency_ms": percentiles(found)}
                for name, found in self.latencies.items()
            },
            "by_key": self.by_key,
            "decisions": self.decisions,
            "wrong": self.wrong,
        }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Exact, in milliseconds; empty without a value."""
    ranked = sorted(seconds)
    if not ranked:
        return {}
    last = len(ranked) - 1
    found = {name: ranked[round(last * share)] * 1000 for name, share in _SHARES.items()}
    return found | {"max": ranked[-1] * 1000}


book = Book()
_numbers = count()


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _arguments(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--keys", default="", help="file of API keys, one a line")
    add("--path", default="/", help="of the requests")
    add("--rate", type=float, default=5, help="requests a second of a paced user")
    add("--quiet-keys", default="", help="file of the noisy neighbour's neighbours' keys")
    add("--stream-bytes", type=int, default=0, help="length of a whole stream, 0 for any")
    add("--report", default="", help="file for what was counted, as JSON")


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _write(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if options and (file := options.report):
        Path(file).write_text(json.dumps(book.report()))


def _read(file: str) -> list[str]:
    keys = Path(file).read_text().split() if file else []
    if not keys:
        raise SystemExit("--keys FILE is needed: API keys, one a line")
    return keys


class Client(FastHttpUser):
    """One user of the API; each has a number, and the keys in turn start with its own."""

    abstract = True
    wait_time = constant(0)
    network_timeout = 20.0
    connection_timeout = 10.0
    group = "all"

    def on_start(self) -> None:
        self.options = self.environment.parsed_options
        self.keys = _read(self.options.keys)
        self.number = next(_numbers)
        self.key = self.keys[self.number % len(self.keys)]

    def ask(self, key: str, due: float | None = None) -> int:
        """One GET; the status, 0 without an answer. `due` is when it should have been sent."""
        sent = time.perf_counter()
        with self.client.get(
            self.options.path,
            headers={"Authorization": f"Bearer {key}"},
            catch_response=True,
            name=self.group,
        ) as response:
            answered = time.perf_counter()
            status = response.status_code
            if status == 429:
                self.check(response)
                response.success()
        self.note(key, status, sent, answered, due)
        return int(status)

    def check(self, response: Any) -> None:
        """A refusal tells when to come back and what was exceeded."""
        if not response.headers.get("retry-after", "").isdigit():
            book.wrong["429 without Retry-After"] += 1
        if b'"violated-policies"' not in (response.content or b""):
            book.wrong["429 that does not name its limit"] += 1

    def note(
        self, key: str, status: int, sent: float, answered: float, due: float | None = None
    ) -> None:
        book.latencies[self.group].append(answered - (sent if due is None else due))
        book.statuses[self.group][str(status)] += 1
        book.by_key[key][str(status)] += 1


class Paced(Client):
    """Sends at a fixed rate: what is late because of a slow answer counts as slow itself."""

    abstract = True

    def on_start(self) -> None:
        super().on_start()
        self.interval = 1 / self.options.rate
        self.due = time.perf_counter() + random.random() * self.interval

    @task
    def at_its_time(self) -> None:
        gevent.sleep(max(0.0, self.due - time.perf_counter()))
        due, self.due = self.due, self.due + self.interval
        self.ask(self.next_key(), due)

    def next_key(self) -> str:
        return self.key


class Steady(Paced):
    """Well within every limit: nobody is to be refused."""

    group = "steady"


class ManyKeys(Paced):
    """Each request is another customer's: caches and counters of all of them are touched."""

    group = "many keys"

    def next_key(self) -> str:
        return random.choice(self.keys)


class Burst(Client):
    """Bursts that run into the rate limit, then a pause. As many keys as users: each customer's
    requests are one after the other, which makes every single decision checkable."""

    group = "burst"

    @task
    def burst(self) -> None:
        for _ in range(30):
            sent = time.perf_counter()
            status = self.ask(self.key)
            if status in (200, 429):
                decision = sent, time.perf_counter(), status == 200
                book.decisions[self.key].append(decision)
        gevent.sleep(random.uniform(0.1, 1))


class Exhaustion(Client):
    """Everybody at once on keys with little quota left: exactly the quota is to be admitted."""

    group = "exhaustion"

    @task
    def any_key(self) -> None:
        self.ask(random.choice(self.keys))


class Noisy(Client):
    """One customer, far above its limit."""

    group = "noisy"
    weight = 1

    @task
    def again(self) -> None:
        self.ask(self.keys[0])


class Quiet(Paced):
    """The noisy one's neighbours: they are to notice nothing."""

    group = "quiet"
    weight = 1

    def on_start(self) -> None:
        super().on_start()
        keys = _read(self.options.quiet_keys)
        self.key = keys[self.number % len(keys)]


class Streaming(Client):
    """Reads streams to their end; one request each, and every byte has to arrive."""

    group = "streaming"

    @task
    def stream(self) -> None:
        sent, received, first = time.perf_counter(), 0, None
        with self.client.get(
            self.options.path,
            headers={"Authorization": f"Bearer {self.key}"},
            stream=True,
            catch_response=True,
            name=self.group,
        ) as response:
            status = response.status_code
            for piece in response.iter_content(64, decode_content=False):
                first = first or time.perf_counter()
                received += len(piece)
            if self.options.stream_bytes and received != self.options.stream_bytes:
                book.wrong["stream cut short"] += 1
        self.note(self.key, status, sent, time.perf_counter())
        if first is not None:
            book.latencies["streaming, first byte"].append(first - sent)
