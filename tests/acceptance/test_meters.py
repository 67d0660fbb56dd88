"""What was counted stays what it is: wiped under another clock or interval, meters out and in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from cli.embedded import EmbeddedPostgres
from core.clock import from_datetime
from core.db import connect_pool, migrate
from core.meters import MeterRegistry
from core.period import add_months
from core.policy import Meter
from tests.acceptance.catalogue import plan
from tests.support import free_port, run_module, wait_until
from tests.support.ledger import packed
from tests.support.stack import Stack, Subscriber

CONFIG = """
gateway: {drain: 2s}
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 2s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
reconciler: {flush_interval: 50ms}
log: {format: json, level: warning}
meters: {%(meters)s}
upstreams:
  api: {urls: ["${UPSTREAM}"]}
routes:
  - {match: {path: /api/*}, upstream: api, meters: {%(costs)s}}
plans:
"""
CREDITS = "credits: {unit: credit, decimals: %d}"
MONTHLY = plan("sold", "monthly: {period: billing, limit: 1000, action: overage}")
YEARLY = plan(
    "sold",
    "monthly: {period: billing, limit: 1000, action: overage}",
    "\n    price: {base: 9, currency: EUR, interval: year}",
)


def config(plans: str = MONTHLY, *, paid: bool = True, decimals: int = 2) -> str:
    costs = "requests: 1, credits: 1.25" if paid and decimals else "requests: 1"
    head = CONFIG % {"meters": CREDITS % decimals if paid else "", "costs": costs}
    return head + plans


def use(stack: Stack, who: Subscriber, times: int) -> None:
    for _ in range(times):
        assert stack.get("/api/x", who.key).status_code == 200


def rows(stack: Stack, who: Subscriber) -> dict[tuple[str, datetime], Decimal]:
    """Totals in Postgres by meter and period start."""
    found = stack._rows("ledger_of_subject", who.id, 100)
    return {(row["meter"], row["period_start"]): row["total"] for row in found}


def wait_for_rows(
    stack: Stack, who: Subscriber, expected: dict[tuple[str, datetime], Decimal]
) -> None:
    wait_until(lambda: rows(stack, who) == expected, what=f"{expected}")


def put(stack: Stack, who: Subscriber, start: datetime, end: datetime, total: int) -> None:
    """Puts a period with one hour at its beginning into the ledger, as an earlier flush did."""
    hour = start.replace(minute=0, second=0, microsecond=0)
    amount: tuple[Any, ...] = ([Decimal(total)], [Decimal(0)], [1], [1])
    stack._rows("accept_states", [who.id], "1", "1")
    row = [who.id], ["requests"], [start]
    stack._rows("store_periods", *packed(*row, [end], *amount))
    stack._rows("store_hours", *packed(*row, [hour], *amount))


def test_wiped_while_the_ledger_is_ahead_of_the_clock(own_stack: Callable[..., Stack]) -> None:
    """The Redis that was lost had a clock ahead: it had begun the next period already."""
    stack = own_stack(config(paid=False))
    who = stack.subscribe("sold")
    ahead = (datetime.now(UTC) + timedelta(days=40)).replace(microsecond=0)
    put(stack, who, ahead, ahead + timedelta(days=30), 7)
    use(stack, who, 3)
    wait_for_rows(stack, who, {("requests", ahead): Decimal(10)})
    stack.quiet()
    stack.redis.flushall()
    use(stack, who, 2)
    wait_for_rows(stack, who, {("requests", ahead): Decimal(12)})


def test_another_interval_and_a_wipe(own_stack: Callable[..., Stack]) -> None:
    """A year that begins with the first month, which is closed and billed."""
    stack = own_stack(config(paid=False))
    who = stack.subscribe("sold")
    anchor = add_months(datetime.now(UTC).replace(microsecond=0), -3) - timedelta(days=2)
    stack.directory("set_anchor", who.id, from_datetime(anchor))
    months = [add_months(anchor, number) for number in range(4)]
    for first, last, total in zip(months, months[1:], (50, 60, 70), strict=False):
        put(stack, who, first, last, total)
    billed = rows(stack, who)
    use(stack, who, 4)
    wait_for_rows(stack, who, {**billed, ("requests", months[3]): Decimal(4)})
    stack.quiet()
    stack.write_config(config(YEARLY, paid=False))
    wait_until(lambda: stack.metric("tallygate_config_reloads_total", result="applied") >= 2)
    stack.redis.flushall()
    use(stack, who, 5)
    wait_for_rows(stack, who, {**billed, ("requests", months[3]): Decimal(9)})


def restart(stack: Stack) -> None:
    """All processes anew, with the configuration as it is now."""
    assert stack.reconciler is not None
    assert stack.reconciler.terminate() == 0
    assert stack.gateways[0].terminate() == 0
    stack.start_gateway(1, 0)
    stack.start_reconciler(0)
    stack.gateways[0].wait_for_http(stack.url("/-/readyz"))


def test_a_meter_taken_out_and_put_back(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(config())
    who, other = stack.subscribe("sold"), stack.subscribe("sold")
    use(stack, who, 4)
    use(stack, other, 4)
    stack.flushed(who, 4)
    stack.quiet()
    # out: what is live of it is flushed on with the rest, by processes that never knew it
    stack.write_config(config(paid=False))
    restart(stack)
    use(stack, who, 3)
    stack.flushed(who, 7)
    stack.quiet()
    assert stack.ledger(who)["credits"].total == Decimal("5.00")
    # and wiped meanwhile
    stack.redis.flushall()
    use(stack, other, 1)
    stack.flushed(other, 5)
    # put back: both go on from what they had
    stack.write_config(config())
    restart(stack)
    for one, requests in ((who, 9), (other, 7)):
        use(stack, one, 2)
        stack.flushed(one, requests)
        stack.quiet()
        assert stack.ledger(one)["credits"].total == Decimal("7.50")


def test_other_decimals_are_refused(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(config())
    who = stack.subscribe("sold")
    use(stack, who, 2)
    stack.flushed(who, 2)
    stack.write_config(config(decimals=0))
    # running processes keep what they have
    wait_until(lambda: stack.metric("tallygate_config_reloads_total", result="refused") >= 2)
    use(stack, who, 2)
    stack.flushed(who, 4)
    assert stack.ledger(who)["credits"].total == Decimal("5.00")
    # and new ones do not start
    listen = ("--listen", f"127.0.0.1:{free_port()}", "--workers", "2")
    for module, more in (("reconciler", ()), ("gateway", listen)):
        with run_module(module, "--config", str(stack.config), *more, env=stack.env) as process:
            assert process.wait() == 1
            assert "meters.credits.decimals: 0: pinned as 2" in process.output
            assert "declare a new meter" in process.output


async def pin(url: str) -> None:
    database = await connect_pool(url, size=1, timeout_s=10)
    await MeterRegistry({"credits": Meter("credits", decimals=4)}).pin(database)
    await database.close()


def test_a_worker_that_finds_out_later_ends(
    own_stack: Callable[..., Stack], server_dir: Path
) -> None:
    """Postgres was away when it started, so what it has pinned was not known."""
    stack = own_stack(config())
    with EmbeddedPostgres(server_dir / "p", port=free_port(), fast=True) as postgres:
        asyncio.run(migrate(postgres.url))
        asyncio.run(pin(postgres.url))
        postgres.stop()
        env = {**stack.env, "TALLYGATE_POSTGRES_URL": postgres.url}
        listen = f"127.0.0.1:{free_port()}"
        arguments = ("--config", str(stack.config), "--listen", listen, "--worker")
        arguments += ("--parent", str(os.getpid()))
        with run_module("gateway", *arguments, env=env) as worker:
            worker.wait_for_http(f"http://{listen}/-/readyz")
            postgres.start()
            assert worker.wait() == 1
            assert "meters_refused" in worker.output
            assert "meters.credits.decimals: 2: pinned as 4" in worker.output
