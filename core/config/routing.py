"""Compiles the routes: references, names, costs, and routes that no request can reach."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from core.config.catalog import MatchSpec, RouteSpec, StatusCharge
from core.config.client import ClientSettings
from core.config.compile import Meters, Plans, attempt, mapping
from core.config.document import Path
from core.config.outcome import OutcomeSpec, compile_cost
from core.config.problems import Problems, did_you_mean, dotted
from core.config.ruling import check_upstream, compile_rules
from core.config.upstream_compile import statuses
from core.config.websocket_compile import compile_websocket, refer_websocket
from core.policy import OutageMode, Route

_LONGEST_NAME = 63


def derived_name(match: MatchSpec, taken: set[str]) -> str:
    """A name from the path (`/weather/*` is `weather`), made unique by methods or a number."""
    stem = re.sub(r"[^a-z0-9]+", "_", match.path.lower()).strip("_") or "root"
    stem = stem if stem[0].isalpha() else f"r_{stem}"
    if stem[:_LONGEST_NAME] in taken and match.methods:
        stem = f"{stem}_{'_'.join(match.methods).lower().replace('-', '_')}"
    name, number = stem[:_LONGEST_NAME], 2
    while name in taken:
        suffix = f"_{number}"
        name, number = stem[: _LONGEST_NAME - len(suffix)] + suffix, number + 1
    return name


def covers(first: MatchSpec, second: MatchSpec) -> bool:
    """Whether every request that matches `second` matches `first` too."""
    if first.host and first.host != second.host:
        return False
    if first.methods and not (second.methods and set(second.methods) <= set(first.methods)):
        return False
    if first.path.endswith("/*"):
        return second.path.startswith(first.path[:-1])
    return first.path == second.path


def compile_routes(
    data: Mapping[str, Any],
    upstreams: set[str],
    meters: Meters,
    plans: Plans,
    problems: Problems,
) -> tuple[Route, ...]:
    """The sound routes, in match order. `upstreams` are the names in the file."""
    raw_routes = data.get("routes")
    if not isinstance(raw_routes, list):
        return ()
    # Names that are written come first, so that a derived one never takes them.
    taken: set[str] = set()
    outage = mapping(mapping(data, "gateway"), "outage")
    has_spool = bool(str(outage.get("spool_dir") or "").strip())
    client = mapping(mapping(data, "gateway"), "client")
    sizes: ClientSettings = attempt(ClientSettings, client) or ClientSettings()
    for index, raw in enumerate(raw_routes):
        name = raw.get("name") if isinstance(raw, dict) else None
        if isinstance(name, str):
            if name in taken:
                problems.add(("routes", index, "name"), "another route has this name; change one")
            taken.add(name)
    earlier: list[tuple[int, MatchSpec]] = []
    routes: list[Route] = []
    for index, raw in enumerate(raw_routes):
        if not isinstance(raw, dict):
            continue
        path: Path = ("routes", index)
        _refer(path, raw, upstreams, meters, plans, problems)
        match: MatchSpec | None = attempt(MatchSpec, raw.get("match"))
        if match is not None:
            _reachable(path, match, earlier, problems)
            earlier.append((index, match))
        spec: RouteSpec | None = attempt(RouteSpec, raw)
        if spec is not None:
            name = spec.name or derived_name(spec.match, taken)
            taken.add(name)
            routes.append(_route(path, name, spec, meters, problems, has_spool, sizes.max_body))
    return tuple(routes)


def _refer(
    path: Path,
    raw: Mapping[str, Any],
    upstreams: set[str],
    meters: Meters,
    plans: Plans,
    problems: Problems,
) -> None:
    upstream, plan = raw.get("upstream"), raw.get("plan")
    check_upstream(path, raw, problems)
    if isinstance(upstream, str) and upstream not in upstreams:
        hint = did_you_mean(upstream, upstreams)
        problems.add((*path, "upstream"), f"unknown upstream; declare it under upstreams{hint}")
    for meter in mapping(raw, "meters"):
        meters.refer((*path, "meters", meter), meter, value=False)
    refer_websocket(path, raw, meters, problems)
    keyless = raw.get("keyless") in (True, "true")
    if keyless and plan is None:
        problems.add((*path, "plan"), "a keyless route needs a plan; name one", value=False)
    elif not keyless and plan is not None:
        problems.add(
            (*path, "plan"),
            "a key brings its own plan; remove this, or write keyless: true",
        )
    elif isinstance(plan, str) and plan not in plans.known:
        hint = did_you_mean(plan, plans.known)
        problems.add((*path, "plan"), f"unknown plan; declare it under plans{hint}")
    elif isinstance(plan, str):
        plans.check_keyless(plan, dotted(path))


def _reachable(
    path: Path, match: MatchSpec, earlier: list[tuple[int, MatchSpec]], problems: Problems
) -> None:
    for index, other in earlier:
        if covers(other, match):
            same = "is the same match" if covers(match, other) else "matches all of it"
            problems.add(
                (*path, "match"),
                f"never reached: routes[{index}] ({other.path}) comes first and {same}; "
                "remove one, or put the narrower one first",
            )
            return


def _route(
    path: Path,
    name: str,
    spec: RouteSpec,
    meters: Meters,
    problems: Problems,
    has_spool: bool,
    max_body: int,
) -> Route:
    prefix = spec.strip_prefix
    if prefix and not f"{spec.match.path}/".startswith(f"{prefix}/"):
        problems.add(
            (*path, "strip_prefix"),
            f"the path {spec.match.path} does not begin with it; shorten it",
        )
    if spec.keyless and spec.charge != "on_admit":
        problems.add(
            (*path, "charge"), "nobody to charge: a keyless route has no customer; remove it"
        )
    if spec.outage != "closed" and not spec.keyless and not has_spool:
        problems.add(
            (*path, "outage"),
            "nowhere to keep what is admitted until it is counted; set gateway.outage.spool_dir",
        )
    costs: dict[str, int] = {}
    actual = []
    for meter, cost in spec.meters.items() if spec.respond is None else ():
        at = (*path, "meters", meter)
        if isinstance(cost, OutcomeSpec):
            rule = compile_cost(at, meter, cost, meters, problems)
            if spec.keyless:
                problems.add(
                    at, "nobody to charge: a keyless route has no customer; write an amount"
                )
            if spec.websocket is not None:
                problems.add(at, "no answer to a WebSocket says what it costs; write an amount")
            if rule is not None:
                actual.append(rule)
                costs[meter] = rule.estimate
            continue
        units = meters.scale(at, meter, cost)
        if units is not None:
            costs[meter] = units
    return Route(
        name=name,
        path=spec.match.path,
        upstream=spec.upstream or "",
        methods=frozenset(spec.match.methods or ()),
        host=spec.match.host or "",
        strip_prefix=prefix or "",
        costs=costs,
        actual=tuple(actual),
        keyless=spec.keyless,
        plan=spec.plan or "",
        forward_key=spec.forward_key,
        reserve=spec.charge != "on_admit",
        charged=_charged(spec.charge),
        outage=OutageMode(spec.outage),
        rules=compile_rules(
            path,
            spec,
            match_path=spec.match.path,
            methods=spec.match.methods or (),
            keyless=spec.keyless,
            stripped=spec.strip_prefix is not None,
            max_body=max_body,
            problems=problems,
        ),
        websocket=compile_websocket(path, spec.websocket, meters),
    )


def _charged(charge: str | StatusCharge) -> frozenset[int] | None:
    return None if isinstance(charge, str) else statuses(charge.status)
