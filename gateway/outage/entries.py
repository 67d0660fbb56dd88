"""What a worker writes down when Redis cannot be asked, and how it is counted later.

  admitted    usage that was served without a decision: it is added
  unresolved  a batch of checks whose answer was lost: what it counted is taken back, as none of
              its requests was served by it
  confirmed   a reservation whose answer was served while it could not be confirmed: it is confirmed
  settled     the same where the answer decides the cost: what is charged so far, or in the end

An entry holds all that its counting needs, so that another worker, under another configuration, can
count what a killed one left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from core.admission.program import Program
from core.admission.settlement import Change, Kind, Operation
from core.policy import Aggregation, Meter
from gateway.admission.check import Unresolved

# One letter each: a spool has millions of these.
_ADMITTED, _UNRESOLVED, _CONFIRMED, _SETTLED = "a", "u", "c", "s"


@dataclass(frozen=True, slots=True)
class Lost:
    """An unresolved batch: the record that tells what became of it, and its checks' refunds.

    `refunds[n]` is of the n-th check, None where there is nothing to take back.
    """

    sender: str
    number: int
    deadline_ms: int
    refunds: tuple[Operation | None, ...]


def admitted(
    subject: str,
    program: Program,
    meters: Mapping[str, Meter],
    caps: Mapping[str, int],
    span: tuple[int, int],
    at_ms: int,
) -> bytes:
    """Usage of one request at a time within a billing period. `caps`: see `cap_of`."""
    rows = [
        (name, units, str(meters[name].aggregation), caps.get(name))
        for name, units in program.costs.items()
    ]
    return orjson.dumps((_ADMITTED, subject, at_ms, *span, rows))


def confirmed(subject: str, name: str) -> bytes:
    """The reservation `name` of a subject was served."""
    return orjson.dumps((_CONFIRMED, subject, name))


def settled(operation: Operation) -> bytes:
    """A COST or a PROGRESS of a reservation that Redis did not take."""
    rows = [(change.meter, change.units) for change in operation.changes]
    kind = int(operation.kind)
    return orjson.dumps((_SETTLED, operation.subject, operation.id, kind, operation.ms, rows))


def corrected(
    subject: str,
    changes: Mapping[str, int],
    caps: Mapping[str, int],
    span: tuple[int, int],
    at_ms: int,
) -> bytes:
    """What usage that was `admitted` at that time cost more, or less, than it says."""
    rows = [(name, units, str(Aggregation.SUM), caps.get(name)) for name, units in changes.items()]
    return orjson.dumps((_ADMITTED, subject, at_ms, *span, rows))


def unresolved(batch: Unresolved, meters: Mapping[str, Meter]) -> bytes:
    """A batch whose answer was lost; a keyless check has nothing to take back."""
    checks: list[object] = []
    for check in batch.checks:
        program = check.program
        if not program.durable:
            checks.append(None)
        elif program.reserve_ms:
            checks.append((check.subject, check.lease))
        else:
            rows = [
                (name, units)
                for name, units in program.costs.items()
                if meters[name].aggregation is Aggregation.SUM
            ]
            checks.append((check.subject, check.period_start_ms, check.period_end_ms, rows))
    return orjson.dumps((_UNRESOLVED, batch.sender, batch.number, batch.deadline_ms, checks))


def read(payload: bytes) -> Operation | Lost:
    """An entry as it was written.

    Raises:
        ValueError: it is none.
    """
    try:
        return _read(orjson.loads(payload))
    except (TypeError, IndexError, KeyError) as error:
        raise ValueError(f"not an entry: {error!r}") from error


def _read(entry: list[Any]) -> Operation | Lost:
    kind = entry[0]
    if kind == _ADMITTED:
        _, subject, at_ms, start_ms, end_ms, rows = entry
        changes = tuple(
            Change(name, units, start_ms, end_ms, at_ms, cap, Aggregation(aggregation))
            for name, units, aggregation, cap in rows
        )
        return Operation(Kind.ADJUST, subject, changes=changes)
    if kind == _CONFIRMED:
        return Operation(Kind.CONFIRM, entry[1], entry[2])
    if kind == _SETTLED:
        _, subject, name, number, ms, rows = entry
        # of what is only named and counted: when it was and in which period is in the reservation
        changes = tuple(Change(meter, units, 0, 0, 0) for meter, units in rows)
        return Operation(Kind(number), subject, name, changes, ms)
    if kind == _UNRESOLVED:
        _, sender, number, deadline_ms, checks = entry
        return Lost(sender, number, deadline_ms, tuple(map(_refund, checks)))
    raise ValueError(f"an entry of kind {kind!r}")


def _refund(check: list[Any] | None) -> Operation | None:
    if check is None:
        return None
    if len(check) == 2:
        return Operation(Kind.REFUND, check[0], check[1])
    subject, start_ms, end_ms, rows = check
    # The time it was counted at is in the record.
    changes = tuple(Change(name, -units, start_ms, end_ms, start_ms) for name, units in rows)
    return Operation(Kind.ADJUST, subject, changes=changes)
