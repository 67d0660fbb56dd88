"""WebSockets of a route: who may open one, what goes through it costs, when it is closed."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, WithJsonSchema, field_validator
from pydantic_core import CoreSchema

from core.config.base import Section
from core.config.fields import Count, DurationMs, Name, Quantity, Size, duration, preset
from core.config.units import UnitError

# The idle are looked for once a second.
MIN_IDLE_MS = 1_000


def parse_origin(value: object) -> str:
    """`https://app.example.com`, with a port where it is not the scheme's own; `null` too.

    Raises:
        UnitError: anything else.
    """
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "null":
        return text
    parts = urlsplit(text)
    if not parts.scheme or not parts.netloc or text != f"{parts.scheme}://{parts.netloc}":
        raise UnitError(
            value, "not an origin; write scheme://host, such as https://app.example.com"
        )
    return text


Origin = Annotated[
    str, BeforeValidator(parse_origin), WithJsonSchema({"type": "string", "pattern": "://|^null$"})
]


class FrameCostSpec(Section):
    """What one meter counts of a WebSocket."""

    per: Literal["message", "byte"] = Field(
        description="What costs: each message, or each byte of payload as it is on the wire."
    )
    sender: Literal["client", "upstream", "both"] = Field(
        default="both", alias="from", description="Whose messages or bytes: client, upstream, both."
    )
    cost: Quantity = Field(
        default=Decimal(1),
        description="What one of them costs.",
        json_schema_extra={"default": 1},
    )


class WebSocketSpec(Section):
    """How WebSockets of a route are served."""

    origins: tuple[Origin, ...] | None = Field(
        default=None,
        min_length=1,
        description="Origins that browsers may connect from (403); any when left out.",
    )
    meters: dict[Name, FrameCostSpec] = Field(
        default_factory=dict,
        description="What goes through costs, by meter, on top of the route's own for the "
        "handshake; nothing is passed on before it is counted.",
    )
    idle_timeout_ms: DurationMs = duration(
        "5m", "idle_timeout", "Closed when neither side has sent anything for so long, 1s at least."
    )
    max_message: Size | None = preset(
        None, None, None, "Payload of one message as it is on the wire (1009); any when left out."
    )
    recheck_ms: DurationMs = duration(
        "10s", "recheck", "How often the key, plan and limits of an open one are looked at again."
    )
    max_connections: Count = preset(
        10_000, 10_000, None, "WebSockets of this route open at once, a worker (503)."
    )

    @field_validator("idle_timeout_ms")
    @classmethod
    def _not_too_soon(cls, idle_timeout_ms: int) -> int:
        if idle_timeout_ms < MIN_IDLE_MS:
            raise ValueError("too short: who is idle is looked for once a second; write 1s or more")
        return idle_timeout_ms


def _switch(value: object) -> object:
    if value in (True, "true"):
        return {}
    return None if value in (False, "false") else value


class _OrSwitch:
    """For the JSON Schema: true and false are accepted, too."""

    @staticmethod
    def __get_pydantic_json_schema__(
        schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "boolean"}, {"const": "true"}]}


# `true` in the file is a spec of defaults, `false` none.
WebSocketField = Annotated[WebSocketSpec | None, BeforeValidator(_switch), _OrSwitch]
