"""`tallygate check FILE`: is this configuration valid, and what does it come to?
`tallygate schema`: the JSON Schema for editors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import click
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.config import Snapshot, json_schema, load
from core.config.units import format_duration, format_quantity, format_rate
from core.doctor import tls
from core.errors import ConfigError
from core.policy import (
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    Plan,
    Quota,
    Route,
    SlidingWindow,
)
from core.rules import UNLIMITED, HeaderRules, RouteRules

# The name of each compiled form, as the scripts and the metrics call it.
ALGORITHMS: Mapping[type, str] = {
    Gcra: "gcra",
    FixedWindow: "fixed_window",
    SlidingWindow: "sliding_window",
    Quota: "quota",
    Concurrency: "concurrency",
}

# Without a terminal there is no width to ask for; wide enough that no limit is folded.
_PLAIN_WIDTH = 160


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the compiled form as JSON.")
@click.pass_context
def check(ctx: click.Context, file: str, as_json: bool) -> None:
    """Validate FILE and show the plans and routes it comes to.

    Exit status: 0 valid, 1 not valid (every problem is listed), 2 wrong usage.
    """
    try:
        snapshot = load(file)
    except ConfigError as error:
        if as_json:
            _print_json({"valid": False, "source": error.source, "problems": error.problems})
        else:
            click.echo(str(error), err=True)
        ctx.exit(1)
    if as_json:
        _print_json(compiled_json(snapshot))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    console.print(_plan_table(snapshot))
    console.print(_route_table(snapshot))
    console.print(f"{file} is valid.", highlight=False, markup=False)
    # Of this machine, which need not be the one that the file is for.
    for finding in tls.examine(snapshot):
        console.print(f"{finding.severity}: {finding.text}", highlight=False, markup=False)


@click.command()
def schema() -> None:
    """Print the JSON Schema of config.yaml, for completion and checks in an editor."""
    _print_json(json_schema())


def compiled_json(snapshot: Snapshot) -> dict[str, Any]:
    """What the hot path reads, as plain JSON values.

    Quantities are integers in the meter's smallest unit, prices decimal text; no setting that
    could hold a secret is included.
    """
    return {
        "valid": True,
        "source": snapshot.source,
        "digest": snapshot.digest,
        "meters": {name: dataclasses.asdict(meter) for name, meter in snapshot.meters.items()},
        "upstreams": {name: dataclasses.asdict(item) for name, item in snapshot.upstreams.items()},
        "routes": [
            {
                **dataclasses.asdict(route),
                "methods": sorted(route.methods),
                "charged": None if route.charged is None else sorted(route.charged),
                "rules": _rules_json(route.rules),
            }
            for route in snapshot.routes
        ],
        "plans": {name: _plan_json(plan) for name, plan in snapshot.plans.items()},
    }


def describe(limit: Limit, meters: Mapping[str, Meter]) -> str:
    """The numbers of a limit in human units, such as `10/s, burst 20`."""
    if isinstance(limit, Concurrency):
        return f"{limit.limit:_} in flight, lease {format_duration(limit.lease_ms)}"
    meter = meters[limit.meter]
    if isinstance(limit, Gcra):
        rate = format_rate(meter.from_units(limit.rate), limit.period_us)
        return f"{rate}, burst {_quantity(meter, limit.burst)}"
    if isinstance(limit, Quota):
        marks = " ".join(map(str, limit.thresholds))
        events = f" (events at {marks} %)" if marks else ""
        return f"{_quantity(meter, limit.limit)} per {limit.period} period{events}"
    return f"{_quantity(meter, limit.limit)} per {format_duration(limit.window_ms)}"


def _quantity(meter: Meter, units: int) -> str:
    return format_quantity(meter.from_units(units))


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        **dataclasses.asdict(plan),
        "status_rule": {str(status): code for status, code in plan.status_rule.items()},
        "limits": [
            {"algorithm": ALGORITHMS[type(limit)], **dataclasses.asdict(limit)}
            for limit in plan.limits
        ],
    }


def _plan_table(snapshot: Snapshot) -> Table:
    table = Table("plan", "limit", "algorithm", "meter", "numbers", "action", "enforce")
    for plan in snapshot.plans.values():
        label = plan.name
        for limit in plan.limits:
            table.add_row(
                label,
                limit.name,
                ALGORITHMS[type(limit)],
                "" if isinstance(limit, Concurrency) else limit.meter,
                describe(limit, snapshot.meters),
                str(limit.action) if isinstance(limit, Quota) else "block",
                "yes" if limit.enforce else "no (shadow)",
            )
            label = ""  # once a plan
        if not plan.limits:
            table.add_row(label, "", "unlimited")
    return table


def _route_table(snapshot: Snapshot) -> Table:
    table = Table("route", "match", "upstream", "cost", "charged", "in an outage", "plan")
    for route in snapshot.routes:
        sources = {rule.meter: f" (until {rule.source} says)" for rule in route.actual}
        costs = ", ".join(
            f"{name} {_quantity(snapshot.meters[name], units)}{sources.get(name, '')}"
            for name, units in route.costs.items()
        )
        methods = " ".join(sorted(route.methods))
        table.add_row(
            route.name,
            # a path may hold what rich takes for markup
            Text(" ".join(part for part in (methods, route.host + route.path) if part)),
            route.upstream or f"(answers {route.rules.answer.status if route.rules.answer else 0})",
            costs or "free",
            _charge(route),
            str(route.outage),
            _plan_of(route),
        )
    return table


def _plan_of(route: Route) -> str:
    if not route.upstream:
        return ""
    return route.plan if route.keyless else "(the key's)"


def _rules_json(rules: RouteRules) -> dict[str, Any]:
    """Of header fields the names alone: a value may be the upstream's credential."""

    def changed(headers: HeaderRules | None) -> dict[str, list[str]] | None:
        if headers is None:
            return None
        written = [name for name, _ in headers.fields]
        return {"written": written, "removed": sorted(headers.dropped - set(written))}

    return {
        "request_headers": changed(rules.request),
        "response_headers": changed(rules.response),
        "add_prefix": rules.add_prefix,
        "rewrite": rules.rewrite and dataclasses.asdict(rules.rewrite),
        "host": "preserve" if rules.preserve_host else rules.host,
        "cors": rules.cors and dataclasses.asdict(rules.cors),
        "respond": rules.answer and rules.answer.status,
        "max_body": None if rules.max_body == UNLIMITED else rules.max_body,
        "encoded_slash": rules.encoded_slash,
    }


def _charge(route: Route) -> str:
    if not route.upstream:
        return "never"
    if not route.reserve:
        return "on admission"
    if route.charged is None:
        return "on an answer"
    return "on " + " ".join(_ranges(sorted(route.charged)))


def _ranges(codes: list[int]) -> list[str]:
    """`2xx` for a whole class, the code for one alone."""
    found = []
    for first in range(200, 600, 100):
        inside = [code for code in codes if first <= code < first + 100]
        found += [f"{first // 100}xx"] if len(inside) == 100 else [str(code) for code in inside]
    return found


def _print_json(value: object) -> None:
    def plain(item: object) -> object:
        if isinstance(item, Decimal):
            return str(item)
        if isinstance(item, frozenset):
            return sorted(item)
        raise TypeError(f"{type(item).__name__} has no JSON form")

    click.echo(orjson.dumps(value, default=plain, option=orjson.OPT_INDENT_2).decode())
