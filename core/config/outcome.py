"""What a route says of a cost that its answer decides: the models, and their compiled form."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from core.config.base import Section
from core.config.document import Path
from core.config.fields import Flag, HeaderName, Quantity, Size, preset
from core.config.units import UnitError, parse_duration, parse_size
from core.cost import MOST_UNITS, ActualCost, FieldPath, OnAbort
from core.policy import Aggregation, Meter

if TYPE_CHECKING:
    from core.config.compile import Meters
    from core.config.problems import Problems

_LIMIT = 2**20
_PATH = re.compile(r"[^\s.]{1,128}(?:\.[^\s.]{1,128}){0,15}")
FORMS = (
    "{header: X-Usage-Cost}, {json: usage.total}, {sse: usage.total}, "
    "{bytes: response, per: 1KiB}, {duration: response, per: 1s}"
)


def _parse_field(value: object) -> FieldPath:
    if isinstance(value, str) and _PATH.fullmatch(value):
        return tuple(value.split("."))
    raise UnitError(value, "not the path of a field; write keys with dots, such as usage.total")


FieldName = Annotated[
    FieldPath,
    BeforeValidator(_parse_field),
    WithJsonSchema({"type": "string", "pattern": r"^[^\s.]+(\.[^\s.]+)*$|\$\{"}),
]
Per = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]})
]


class SourceSpec(Section):
    """Where in the answer a cost is."""

    header: HeaderName | None = Field(
        default=None, description="A header of the answer, or a trailer, that has the number."
    )
    strip: Flag | None = preset(
        None, True, None, "With header: the client does not see it; false passes it on."
    )
    json_field: FieldName | None = Field(
        default=None, alias="json", description="A field of a JSON body, such as usage.total."
    )
    sse_field: FieldName | None = Field(
        default=None,
        alias="sse",
        description="A field of the JSON in server-sent events; the last event that has it counts.",
    )
    per_event: Quantity | None = Field(
        default=None,
        description="With sse: an event that comes after the last total, in an answer that is cut.",
    )
    limit: Size | None = preset(
        None, "1 MiB", None, "With json or sse: a longer body, or event, is not looked at."
    )
    measured: Literal["response"] | None = Field(
        default=None, alias="bytes", description="response: the bytes of its body."
    )
    duration: Literal["response"] | None = Field(
        default=None, description="response: from the request's admission to the answer's end."
    )
    per: Per | None = Field(
        default=None, description="What one unit is: a size with bytes, a time with duration."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        body = self.json_field is not None or self.sse_field is not None
        found = [self.header is not None, body, bool(self.measured), bool(self.duration)]
        if sum(found) != 1:
            raise ValueError(
                f"{'mixes' if sum(found) else 'none of the'} sources; write one of {FORMS}"
            )
        for key, given, fits in (
            ("strip", self.strip, found[0]),
            ("per_event", self.per_event, self.sse_field is not None),
            ("limit", self.limit, body),
            ("per", self.per, found[2] or found[3]),
        ):
            if given is not None and not fits:
                raise ValueError(f"{key} does not belong to this source; remove it, or see {FORMS}")
        if self.limit == 0:
            raise ValueError("limit: nothing would be looked at; write a size such as 1 MiB")
        self.per_unit()
        return self

    def per_unit(self) -> int:
        """Bytes or ms of one unit."""
        parse: Callable[[object], int] = parse_size if self.measured else parse_duration
        if self.per is None:
            return 1
        try:
            per = parse(self.per)
        except UnitError as error:
            raise ValueError(f"per: {error}") from None
        if per < 1:
            raise ValueError("per: a unit of nothing; write 1 or more")
        return per


class OutcomeSpec(Section):
    """A cost that the answer decides."""

    estimate: Quantity = Field(
        description="Asked of the limits and charged on admission, until the answer says better."
    )
    source: SourceSpec = Field(alias="from", description="Where in the answer the cost is.")
    on_abort: Literal["streamed", "estimate", "nothing"] = Field(
        default="estimate",
        description="Cost of an answer that is cut: what was streamed, the estimate, or nothing.",
    )
    max: Quantity | None = Field(
        default=None,
        description="The most one answer costs: what is measured ends there, and what is reported "
        "above it is not believed.",
    )


def compile_cost(
    path: Path, name: str, spec: OutcomeSpec, meters: Meters, problems: Problems
) -> ActualCost | None:
    """The rule of one meter, or None after reporting what is wrong with it."""
    meter = meters.compiled.get(name)
    if meter is None:
        return None
    source = spec.source
    estimate = meters.scale((*path, "estimate"), name, spec.estimate)
    most: int | None = MOST_UNITS
    if spec.max is not None:
        most = meters.scale((*path, "max"), name, spec.max)
    per_event = meters.scale((*path, "from", "per_event"), name, source.per_event or Decimal(0))
    if estimate is None or most is None or per_event is None:
        return None
    problem = _problem(meter, spec, estimate, most)
    if problem is not None:
        key, reason = problem
        problems.add((*path, key) if key else path, reason, value=bool(key))
        return None
    body = source.json_field or source.sse_field
    return ActualCost(
        meter=name,
        decimals=meter.decimals,
        estimate=estimate,
        most=most,
        on_abort=OnAbort(spec.on_abort),
        header=source.header or "",
        strip=source.strip is not False,
        json=source.json_field or (),
        sse=source.sse_field or (),
        per_event=per_event,
        limit=(source.limit or _LIMIT) if body else 0,
        bytes_per=source.per_unit() if source.measured else 0,
        ms_per=source.per_unit() if source.duration else 0,
    )


def _problem(meter: Meter, spec: OutcomeSpec, estimate: int, most: int) -> tuple[str, str] | None:
    """The key that is wrong, and why."""
    source, streamed = spec.source, OnAbort(spec.on_abort) is OnAbort.STREAMED
    if meter.aggregation is not Aggregation.SUM:
        return "", (
            f"an answer only corrects a sum, and this meter keeps the {meter.aggregation} value; "
            "write a fixed amount, or name a meter with aggregation sum"
        )
    if estimate < 1:
        return "estimate", "it is what the limits are asked for; write more than 0"
    if most > MOST_UNITS:
        return "max", f"totals would not be exact; at most {meter.from_units(MOST_UNITS):f}"
    if estimate > most:
        key = "estimate" if spec.max is None else "max"
        return key, "the estimate is above the most that an answer may cost; change one"
    if streamed and source.json_field and not source.sse_field:
        return "on_abort", "half of a JSON body says nothing; write estimate or nothing"
    if streamed and source.sse_field and source.per_event is None:
        return "on_abort", (
            "events before the total have no cost yet; add per_event to from (0 where each event "
            "brings the total so far), or write estimate or nothing"
        )
    return None


__all__ = ["FORMS", "OutcomeSpec", "SourceSpec", "compile_cost"]
