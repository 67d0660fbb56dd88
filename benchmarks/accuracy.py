"""Whether a load test's answers are what the plan allows, and its counts what was answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_LINES = 5


def findings(
    report: Mapping[str, Any],
    live: Mapping[str, int],
    ledger: Mapping[str, int],
    *,
    kind: str,
    quota: int = 0,
    rate: float = 0,
    burst: int = 0,
    quiet: Iterable[str] = (),
) -> list[str]:
    """What is wrong, in words; empty when nothing is.

    Args:
        report: of benchmarks/locustfile.py.
        live, ledger: requests counted by key, in Redis and in Postgres.
        kind: which refusals are right: `none`, `any`, `quota` (all above `quota`), `rate` (those
            that a bucket of `burst` that drains at `rate` a second has to refuse).
        quiet: keys that must not have been refused, whatever the kind.
    """
    found = [f"{text}: {count} times" for text, count in report["wrong"].items()]
    quiet = set(quiet)
    for key, total in live.items():
        statuses = dict(report["by_key"].get(key, {}))
        admitted, refused = statuses.pop("200", 0), statuses.pop("429", 0)
        unknown = sum(statuses.values())  # without an answer, or a failure: counted or not
        name = key[:12] + "…"
        if not admitted <= total <= admitted + unknown:
            found.append(f"{name}: {admitted} served, {total} counted")
        if ledger[key] != total:
            found.append(f"{name}: {total} counted, {ledger[key]} in the ledger")
        if unknown:
            found.append(f"{name}: unexpected answers {statuses}")
        if refused and (kind == "none" or key in quiet):
            found.append(f"{name}: {refused} refused within its limits")
        if kind == "quota" and key not in quiet:
            allowed = min(quota, admitted + refused)
            if admitted != allowed:
                found.append(f"{name}: {admitted} admitted of a quota of {allowed}")
    if kind == "rate":
        found += rate_findings(report["decisions"], rate, burst)
    if len(found) > _MAX_LINES:
        found[_MAX_LINES:] = [f"… and {len(found) - _MAX_LINES} more"]
    return found


def rate_findings(
    decisions: Mapping[str, Sequence[tuple[float, float, bool]]], rate: float, burst: int
) -> list[str]:
    """Decisions that no clock explains, of requests of one customer one after the other.

    A request was decided some time between its sending and its answer. With the earliest and latest
    possible times, the fill of the bucket lies between `least` and `most`: an admission is wrong if
    even the least fill was too much, a refusal if even the most left room.
    """
    found = []
    for key, sequence in decisions.items():
        admitted, over, under = 0, 0, 0
        # fill at t after admissions at t_0 … t_n-1: max over j of (n - j) - rate * (t - t_j)
        latest = earliest = float("-inf")  # max over j of rate * t_j - j, by either time
        for sent, answered, was_admitted in sequence:
            most = max(0.0, admitted + latest - rate * sent)
            least = max(0.0, admitted + earliest - rate * answered)
            if was_admitted:
                over += least + 1 > burst + _ROUNDING
                latest = max(latest, rate * answered - admitted)
                earliest = max(earliest, rate * sent - admitted)
                admitted += 1
            else:
                under += most + 1 < burst - _ROUNDING
        name = key[:12] + "…"
        found += [f"{name}: {over} admitted above its rate"] if over else []
        found += [f"{name}: {under} refused below its rate"] if under else []
    return found


_ROUNDING = 0.05  # requests: the gateway's clock has microseconds, ours drifts a little
