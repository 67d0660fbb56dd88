"""Models of what is sold and counted: meters, routes, plans and their limits.

These hold what the file says; `compile` checks references and numbers across them and builds the
`core.policy` form that the hot path reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
)

from core.config import units
from core.config.base import Section
from core.config.fields import (
    Count,
    Decimals,
    DurationMs,
    Flag,
    Host,
    MatchPath,
    Method,
    Name,
    Prefix,
    Quantity,
    Rate,
    StatusClass,
    duration,
    preset,
)
from core.config.outcome import OutcomeSpec
from core.config.rules import RuleKeys
from core.config.units import UnitError
from core.config.websocket import WebSocketField
from core.policy import REQUESTS, Action, Aggregation, PeriodKind, Status

# The key that tells each form of limit, and how that form is written.
LIMIT_FORMS: Mapping[str, str] = {
    "rate": "{rate, burst, meter}",
    "window": "{window, limit, sliding, meter}",
    "period": "{period, limit, action, thresholds, meter}",
    "concurrency": "{concurrency, lease}",
}
LIMIT_HELP = (
    "a limit is one of " + ", ".join(LIMIT_FORMS.values()) + ", each with enforce if wanted"
)
# Marks a union's tag in an error location, so that it cannot be taken for a key of the file.
FORM_TAG = "form:"


def limit_form(value: Any) -> str | None:
    """The tag of the one form whose key is there; None when there is none, or a mix."""
    if isinstance(value, Mapping):
        found = [key for key in LIMIT_FORMS if key in value]
        return FORM_TAG + found[0] if len(found) == 1 else None
    return FORM_TAG + value.form if isinstance(value, LimitBase) else None


def parse_threshold(value: object) -> int:
    """`80`, `80%` or `0.8` as the whole percentage 80, from 1 to 100.

    Raises:
        UnitError: anything else; a fraction must be a whole percentage.
    """
    # With a decimal point it is a fraction of one, without it a percentage: 1.0 is all, 1 is 1 %.
    text = value.strip() if isinstance(value, str) else value
    percent = text.removesuffix("%").rstrip() if isinstance(text, str) else text
    try:
        number = units.parse_quantity(percent)
    except UnitError:
        number = Decimal(-1)
    if number.as_tuple().exponent != 0 and number <= 1 and percent == text:
        number *= 100
    if number != int(number) or not 1 <= number <= 100:
        raise UnitError(value, "not a threshold; write a percentage from 1 to 100, or 0.01 to 1.0")
    return int(number)


Threshold = Annotated[
    int,
    BeforeValidator(parse_threshold),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
                {"type": "string", "pattern": r"^[0-9.]+ ?%?$|\$\{"},
            ]
        }
    ),
]


def _ascending(thresholds: tuple[int, ...]) -> tuple[int, ...]:
    for before, after in pairwise(thresholds):
        if after <= before:
            raise ValueError(
                f"thresholds overlap: {after} comes after {before}; "
                "write each once, in ascending order"
            )
    return thresholds


_LONGEST_UNIT = 64


class LimitBase(Section):
    """What every form of limit has."""

    form: ClassVar[str]  # the key of `LIMIT_FORMS` that tells this form

    enforce: Flag = preset(
        True, True, None, "false is shadow mode: counted and reported, never refuses."
    )


class RateLimit(LimitBase):
    """A smooth rate with a burst (GCRA), such as {rate: 10/s, burst: 20}."""

    form = "rate"

    rate: Rate = Field(description="Count and period, such as 10/s, 600/m or 100/10s.")
    burst: Quantity | None = preset(
        None, None, None, "How much may come at once; the rate's count by default."
    )
    meter: Name = preset(REQUESTS, REQUESTS, None, "What is counted.")


class WindowLimit(LimitBase):
    """A count a window, such as {window: 1d, limit: 1_000}."""

    form = "window"

    window_ms: DurationMs = Field(alias="window", description="Length of the window, such as 1d.")
    limit: Quantity = Field(description="What one window admits, in units of the meter.")
    sliding: Flag = preset(
        False, False, None, "true: any span of the window's length, not only aligned ones."
    )
    meter: Name = preset(REQUESTS, REQUESTS, None, "What is counted.")


class PeriodLimit(LimitBase):
    """A quota a period, such as {period: billing, limit: 10_000, action: overage}."""

    form = "period"

    period: Literal["billing", "day", "week", "month", "year"] = Field(
        description="billing follows the subscription; the others the calendar, in UTC."
    )
    limit: Quantity = Field(description="What one period includes, in units of the meter.")
    action: Literal["block", "warn", "overage"] = Field(
        default="block",
        description="Past the limit: block refuses (429), warn admits, overage admits and bills.",
    )
    thresholds: Annotated[tuple[Threshold, ...], AfterValidator(_ascending)] = Field(
        default=(80, 90, 95, 100),
        description="Ascending percentages; each fires one event a period. Fractions work too.",
    )
    meter: Name = preset(REQUESTS, REQUESTS, None, "What is counted.")

    @property
    def period_kind(self) -> PeriodKind:
        return PeriodKind(self.period)

    @property
    def action_kind(self) -> Action:
        return Action(self.action)


class ConcurrencyLimit(LimitBase):
    """Requests in flight at once, such as {concurrency: 50}."""

    form = "concurrency"

    concurrency: Count = Field(description="Requests in flight at once.")
    lease_ms: DurationMs = duration(
        "30s", "lease", "After this a slot whose gateway died is free again."
    )


AnyLimit = RateLimit | WindowLimit | PeriodLimit | ConcurrencyLimit
LimitSpec = Annotated[
    Annotated[RateLimit, Tag(FORM_TAG + "rate")]
    | Annotated[WindowLimit, Tag(FORM_TAG + "window")]
    | Annotated[PeriodLimit, Tag(FORM_TAG + "period")]
    | Annotated[ConcurrencyLimit, Tag(FORM_TAG + "concurrency")],
    Discriminator(
        limit_form, custom_error_type="limit_form", custom_error_message="not one form of limit"
    ),
]


class MeterSpec(Section):
    """Something that is counted."""

    unit: str = Field(
        default="request",
        description="What one unit is called, such as credit; printable ASCII.",
    )
    aggregation: Literal["sum", "max", "last"] = Field(
        default="sum", description="How values of one period become its total."
    )
    decimals: Decimals = preset(0, 0, None, "Decimals a quantity keeps, 0 to 6.")

    @field_validator("unit")
    @classmethod
    def _fits_a_header(cls, unit: str) -> str:
        if not (unit.isascii() and unit.isprintable() and 1 <= len(unit) <= _LONGEST_UNIT):
            raise ValueError(
                "it stands in a header field; write printable ASCII, such as credit, of at most "
                f"{_LONGEST_UNIT} characters"
            )
        return unit

    @property
    def aggregation_kind(self) -> Aggregation:
        return Aggregation(self.aggregation)


class MatchSpec(Section):
    """What a request must look like."""

    path: MatchPath = Field(description="/exact, or /prefix/* for everything below it.")
    methods: tuple[Method, ...] | None = Field(
        default=None, min_length=1, description="Methods; every method when left out."
    )
    host: Host | None = Field(default=None, description="Host name; every host when left out.")


class StatusCharge(Section):
    """Which answers are paid for."""

    status: tuple[StatusClass, ...] = Field(
        min_length=1, description="Status codes such as 200, or classes such as 2xx."
    )


def _charge_form(value: Any) -> str:
    return FORM_TAG + ("status" if isinstance(value, Mapping | StatusCharge) else "word")


ChargeRule = Annotated[
    Annotated[Literal["on_admit", "on_response"], Tag(FORM_TAG + "word")]
    | Annotated[StatusCharge, Tag(FORM_TAG + "status")],
    Discriminator(_charge_form),
]


def _cost_form(value: Any) -> str:
    return FORM_TAG + ("outcome" if isinstance(value, Mapping | OutcomeSpec) else "amount")


CostRule = Annotated[
    Annotated[Quantity, Tag(FORM_TAG + "amount")]
    | Annotated[OutcomeSpec, Tag(FORM_TAG + "outcome")],
    Discriminator(_cost_form),
]


class RouteSpec(RuleKeys):
    """What a request matches and what then happens to it."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["upstream"]}, {"required": ["respond"]}]}
    )

    name: Name | None = Field(
        default=None, description="Name in metrics and logs; derived from the path by default."
    )
    match: MatchSpec = Field(description="What a request must look like.")
    upstream: str | None = Field(
        default=None, description="Name of the upstream that answers; or write respond."
    )
    strip_prefix: Prefix | None = Field(
        default=None, description="Taken off the path before the upstream sees it."
    )
    meters: dict[Name, CostRule] = Field(
        default={REQUESTS: Decimal(1)},
        description="What one request costs, a meter: an amount, or {estimate, from} where the "
        "answer decides. Only what is written is charged.",
        json_schema_extra={"default": {REQUESTS: 1}},
    )
    keyless: Flag = preset(False, False, None, "true admits without a key, by client address.")
    plan: str | None = Field(
        default=None, description="Plan of each client address; for keyless routes only."
    )
    forward_key: Flag = preset(False, False, None, "true lets the upstream see the key.")
    charge: ChargeRule = Field(
        default="on_admit",
        description="What is paid for: on_admit all that went upstream, on_response what was "
        "answered, {status: [2xx, 404]} those answered so.",
    )
    outage: Literal["closed", "open", "local"] = Field(
        default="closed",
        description="While Redis does not answer: closed refuses (503), open admits, local admits "
        "within this worker's share of each limit; what is admitted is counted afterwards.",
    )
    websocket: WebSocketField = Field(
        default=None, description="true, or how WebSockets are served; they are not by default."
    )


class MeterPriceSpec(Section):
    """Price of one meter."""

    included: Quantity = Field(
        default=Decimal(0),
        description="Units that the base price includes.",
        json_schema_extra={"default": 0},
    )
    overage: Quantity = Field(
        default=Decimal(0),
        description="Price of each unit beyond those.",
        json_schema_extra={"default": 0},
    )


def _parse_currency(value: object) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    if len(text) == 3 and text.isascii() and text.isalpha():
        return text
    raise UnitError(value, "not a currency; write its three-letter code, such as usd")


class PriceSpec(Section):
    """What a plan costs."""

    base: Quantity = Field(description="Price of one interval, in units of the currency.")
    currency: Annotated[str, BeforeValidator(_parse_currency)] = Field(
        description="ISO 4217 code, such as usd."
    )
    interval: Literal["month", "quarter", "year"] = Field(
        default="month", description="Length of the billing period."
    )
    meters: dict[Name, MeterPriceSpec] = Field(default_factory=dict, description="Prices by meter.")


class PlanSpec(Section):
    """A named set of limits that customers subscribe to."""

    description: str = Field(default="", description="For people; shown in console and portal.")
    price: PriceSpec | None = Field(default=None, description="What it costs; free when left out.")
    on_status: dict[
        Literal["trialing", "active", "past_due", "paused", "canceled"],
        Literal["admit", "payment_required", "refuse"],
    ] = Field(
        default_factory=dict,
        description="Answer by subscription status: admit, payment_required (402), refuse (403). "
        "By default past_due answers 402, paused and canceled 403, the others admit.",
    )
    unlimited: Flag = preset(False, False, None, "true says that no limit is meant.")
    limits: dict[Name, LimitSpec] = Field(
        default_factory=dict,
        description="Limits by name; the name identifies the counter, so numbers may change.",
    )

    def status_answers(self) -> dict[Status, int | None]:
        """HTTP status by subscription status, None to admit; only what the file says."""
        codes = {"admit": None, "payment_required": 402, "refuse": 403}
        return {Status(status): codes[word] for status, word in self.on_status.items()}


INTERVAL_MONTHS: Mapping[str, int] = {"month": 1, "quarter": 3, "year": 12}
