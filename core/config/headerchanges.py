"""Models of changes of header fields: their names, and their values with variables."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Final, Self

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from core.config.base import Section
from core.config.units import UnitError
from core.rules import Template

# What a value may hold besides text.
VARIABLES: Final = frozenset(
    ("client_ip", "host", "plan", "request_id", "route", "scheme", "subscription")
)
# Of an answer without an upstream: nobody is known there, and a redirect wants the path.
ANSWER_VARIABLES: Final = frozenset(
    ("client_ip", "host", "path", "request_id", "route", "scheme", "uri")
)

MAX_VALUE: Final = 4 * 1024

_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_PIECE = re.compile(r"\{\{|\}\}|\{([a-z_]*)\}|[{}]")

_TEXT = {"type": "string"}

_HOP = "it belongs to one connection, and the gateway writes it; remove it"
_CLIENT = "it says who the client is, and the gateway writes it (gateway.trusted_proxies)"
_REFUSED: Final = {
    **dict.fromkeys(
        (
            "connection", "keep-alive", "proxy-authenticate", "proxy-authentication-info",
            "proxy-authorization", "proxy-connection", "te", "trailer", "upgrade", "http2-settings",
        ),
        _HOP,
    ),
    "content-length": "it frames the message, and the gateway writes it; remove it",
    "transfer-encoding": "it frames the message, and the gateway writes it; remove it",
}  # fmt: skip
_REFUSED_IN_REQUESTS: Final = {
    **_REFUSED,
    "host": "write `host` on the route itself",
    "expect": "the gateway answers it; remove it",
    "x-forwarded-for": _CLIENT,
    "x-forwarded-host": _CLIENT,
    "x-forwarded-proto": _CLIENT,
    "forwarded": _CLIENT,
    "x-request-id": "it is sent as it is; use another name for {request_id}",
}
_LIMITS = "the gateway says its limits there (gateway.headers); use another name"
_REFUSED_IN_ANSWERS: Final = {
    **_REFUSED,
    "ratelimit": _LIMITS,
    "ratelimit-policy": _LIMITS,
    "x-request-id": "it is sent as it is; use another name for {request_id}",
}
_OUR_PREFIXES: Final = ("x-ratelimit-", "x-tallygate-")


def parse_template(value: object, known: Collection[str]) -> Template:
    """A header value with variables, such as `for={client_ip}`; `{{` and `}}` are braces.

    Raises:
        UnitError: no printable text, or a variable that is not in `known`.
    """
    if isinstance(value, dict):
        raise UnitError("{…}", 'not text; put it in quotes, such as "{client_ip}"')
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UnitError(value, "not text; put it in quotes")
    text = str(value).strip()
    if not _VALUE.fullmatch(text) or len(text) > MAX_VALUE:
        raise UnitError(
            "(text)",
            f"not a header value; write printable ASCII in one line, {MAX_VALUE} bytes at most",
        )
    parts = [""]
    at = 0
    for found in _PIECE.finditer(text):
        parts[-1] += text[at : found.start()]
        at = found.end()
        name = found[1]
        if name is None and len(found[0]) == 1:
            raise UnitError(text, "a brace alone; write {{ for {, and }} for }")
        if name is None:
            parts[-1] += found[0][0]
        elif name in known:
            parts += (name, "")
        else:
            names = ", ".join(sorted(known))
            raise UnitError(
                text, f"unknown variable {{{name}}}; known here: {names}; write {{{{ for {{"
            )
    parts[-1] += text[at:]
    return tuple(parts)


def _template(known: Collection[str]) -> Any:
    return PlainValidator(lambda value: parse_template(value, known))


def _name(refused: dict[str, str], prefixes: tuple[str, ...] = ()) -> BeforeValidator:
    def parse(value: object) -> str:
        text = value.strip().lower() if isinstance(value, str) else ""
        if not _HEADER.fullmatch(text):
            raise UnitError(value, "not a header name; write letters, digits and -")
        reason = refused.get(text) or (_LIMITS if text.startswith(prefixes) else "")
        if reason:
            raise UnitError(value, f"{text} cannot be changed: {reason}")
        return text

    return BeforeValidator(parse)


_FIELD_SCHEMA = WithJsonSchema({"anyOf": [_TEXT, {"type": "integer"}]})
FieldValue = Annotated[Template, _template(VARIABLES), _FIELD_SCHEMA]
AnswerValue = Annotated[Template, _template(ANSWER_VARIABLES), _FIELD_SCHEMA]
RequestField = Annotated[str, _name(_REFUSED_IN_REQUESTS), WithJsonSchema(_TEXT)]
AnswerField = Annotated[str, _name(_REFUSED_IN_ANSWERS, _OUR_PREFIXES), WithJsonSchema(_TEXT)]


def _contradiction(given: Collection[str], removed: Collection[str]) -> None:
    both = sorted(set(given) & set(removed))
    if both:
        raise ValueError(
            f"{both[0]} is set and removed; remove one of the two (set replaces what was there)"
        )


class RequestHeaderSpec(Section):
    """Changes of the fields that go upstream. `{client_ip}` and the like are filled in."""

    set: dict[RequestField, FieldValue] = Field(
        default_factory=dict, description="Fields by name; each replaces what the client sent."
    )
    add: dict[RequestField, FieldValue] = Field(
        default_factory=dict, description="Fields by name, beside what the client sent."
    )
    remove: tuple[RequestField, ...] = Field(
        default=(), description="Names of fields that do not go upstream."
    )

    @model_validator(mode="after")
    def _clear(self) -> Self:
        _contradiction({**self.set, **self.add}, self.remove)
        return self


class AnswerHeaderSpec(Section):
    """Changes of the fields of the upstream's answers. `{request_id}` and such are filled in."""

    set: dict[AnswerField, FieldValue] = Field(
        default_factory=dict, description="Fields by name; each replaces the upstream's."
    )
    add: dict[AnswerField, FieldValue] = Field(
        default_factory=dict, description="Fields by name, beside the upstream's."
    )
    remove: tuple[AnswerField, ...] = Field(
        default=(), description="Names of fields that do not reach the client."
    )

    @model_validator(mode="after")
    def _clear(self) -> Self:
        _contradiction({**self.set, **self.add}, self.remove)
        return self
