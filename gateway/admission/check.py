"""One check of a request on its way to Redis, and what is left of a batch that got no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from core.admission.program import Program


@dataclass(slots=True, eq=False)
class Check:
    """One request's check. `keys` are the state key and the lease keys, in the program's order."""

    program: Program
    keys: tuple[str, ...]
    period_start_ms: int
    period_end_ms: int
    lease: str
    future: asyncio.Future[Sequence[int]]
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A batch whose answer was lost: `sender` and `number` name its record, if it left one.

    It counts nothing once Redis' clock has passed `deadline_ms`; `checks` are in its order.
    """

    sender: str
    number: int
    deadline_ms: int
    checks: tuple[Check, ...]


def grouped(batch: list[Check]) -> list[list[Check]]:
    """Equal checks together: one entry of the call each. Those with an id of their own stand alone.

    Many connections of one subscription are common, and their checks then cost Redis one hash read
    and written, and a few arguments, together. Checks of one batch have no order among themselves.
    """
    groups: dict[tuple[int, str, int], list[Check]] = {}
    alone: list[list[Check]] = []
    for check in batch:
        if check.program.single:
            alone.append([check])
            continue
        equal = (id(check.program), check.keys[0], check.period_start_ms)
        group = groups.get(equal)
        if group is None:
            groups[equal] = [check]
        else:
            group.append(check)
    return [*groups.values(), *alone]
