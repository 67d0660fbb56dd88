"""Models of what a route does to paths, for browsers, and without an upstream."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

import orjson
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from core.config import units
from core.config.base import Section
from core.config.fields import (
    DurationOrZeroMs,
    Flag,
    HeaderName,
    Method,
    Prefix,
    duration,
    preset,
)
from core.config.headerchanges import (
    AnswerField,
    AnswerHeaderSpec,
    AnswerValue,
    RequestHeaderSpec,
)
from core.config.units import UnitError
from core.rules import UNLIMITED, Template

MAX_ANSWER: Final = 64 * 1024

_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?(?::[0-9]{1,5})?"
    r"|[a-z][a-z0-9+.-]*://\[[0-9a-f:.]+\](?::[0-9]{1,5})?"
)
_UPSTREAM_HOST = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)
_CAPTURE = re.compile(r"\{([a-z][a-z0-9_]*)(\.\.\.)?\}")

_TEXT = {"type": "string"}
_REFERENCE = {"type": "string", "pattern": r"\$\{"}


def _segments(value: object) -> tuple[str, ...]:
    """The segments of `/a/{b}/{rest...}`; each is text or one capture."""
    text = value if isinstance(value, str) else ""
    reason = "not a path to rewrite; write /old/{id}/{rest...}: a name stands for a whole segment"
    if not text.startswith("/") or re.search(r"[\s?#*%;\\]|//|/\.{1,2}(?:/|$)", text):
        raise UnitError(value, reason)
    segments = tuple(text[1:].split("/"))
    names = []
    for index, segment in enumerate(segments):
        found = _CAPTURE.fullmatch(segment)
        if found is None and ("{" in segment or "}" in segment):
            raise UnitError(value, reason)
        if found is not None:
            names.append(found[1])
            if found[2] and index + 1 < len(segments):
                raise UnitError(value, f"{segment} takes all that is left, so it comes last")
    if len(set(names)) < len(names):
        raise UnitError(value, "a name is used twice; give each segment its own")
    return segments


def _result(value: object) -> Template:
    """Text and names by turns."""
    text = value if isinstance(value, str) else ""
    plain = _CAPTURE.sub("x", text)
    if not text.startswith("/") or re.search(r"[\s?#*;\\{}]|//|/\.{1,2}(?:/|$)", plain):
        raise UnitError(value, "not a path; write /new/{id}/{rest}, with the names of `from`")
    if re.search(r"%(?![0-9A-Fa-f]{2})|%2[EeFf]|%5[Cc]|%00", plain):
        raise UnitError(value, "not a path in normal form; write it without encoded dots, slashes")
    parts = [""]
    at = 0
    for found in _CAPTURE.finditer(text):
        if found[2]:
            raise UnitError(value, f"write {{{found[1]}}}, without the dots")
        parts[-1] += text[at : found.start()]
        parts += (found[1], "")
        at = found.end()
    parts[-1] += text[at:]
    return tuple(parts)


class RewriteSpec(Section):
    """Another path upstream, segment by segment; a path that does not fit stays as it is."""

    source: Annotated[tuple[str, ...], PlainValidator(_segments), WithJsonSchema(_TEXT)] = Field(
        alias="from",
        description="The whole path, such as /old/{id}/{rest...}: {id} takes one segment, "
        "{rest...} all that are left.",
    )
    to: Annotated[Template, PlainValidator(_result), WithJsonSchema(_TEXT)] = Field(
        description="What the upstream gets, such as /new/{rest}/{id}."
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        captures = {}
        for segment in self.source:
            found = _CAPTURE.fullmatch(segment)
            if found is not None:
                captures[found[1]] = bool(found[2])
        for index, name in enumerate(self.to[1::2]):
            if name not in captures:
                raise ValueError(f"{{{name}}} is not in `from`; name it there")
            before, after = self.to[2 * index], self.to[2 * index + 2]
            if captures[name] and (not before.endswith("/") or (after and after[0] != "/")):
                raise ValueError(
                    f"{{{name}}} may be empty or many segments: write it between slashes"
                )
        return self


def _parse_origin(value: object) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text == "*":
        return text
    if text == "null":
        raise UnitError(
            value, "not an origin: any page can come as null from a sandbox; name the real one"
        )
    if not _ORIGIN.fullmatch(text):
        raise UnitError(
            value,
            "not an origin; write https://app.example.com, https://*.example.com or *, "
            "without a path",
        )
    for scheme, port in (("http://", ":80"), ("https://", ":443")):
        if text.startswith(scheme) and text.endswith(port):
            raise UnitError(value, f"browsers leave {port} out of it; do so, too")
    return text


def _parse_any(kind: Callable[[str], str | None], reason: str) -> BeforeValidator:
    def parse(value: object) -> str:
        text = kind(value.strip()) if isinstance(value, str) else None
        if text is None:
            raise UnitError(value, reason)
        return text

    return BeforeValidator(parse)


CorsHeader = Annotated[
    str,
    _parse_any(
        lambda text: text.lower() if _HEADER.fullmatch(text.lower()) else None,
        "not a header name; write letters, digits and -, or * for all",
    ),
    WithJsonSchema(_TEXT),
]


class CorsSpec(Section):
    """Which pages in a browser may call the route. Preflights are answered here, for free."""

    origins: tuple[Annotated[str, BeforeValidator(_parse_origin), WithJsonSchema(_TEXT)], ...] = (
        Field(
            min_length=1,
            description="Origins such as https://app.example.com; https://*.example.com for all "
            "below a name, * for everybody.",
        )
    )
    methods: tuple[Method, ...] | None = Field(
        default=None,
        min_length=1,
        description="Methods a page may use; those of the route, or the usual six.",
    )
    headers: tuple[CorsHeader, ...] | None = Field(
        default=None,
        min_length=1,
        description="Fields a page may send: those a key comes in, Content-Type and X-Request-Id "
        "by default; * for all.",
    )
    expose: tuple[HeaderName, ...] = Field(
        default=(),
        description="Fields a page may read, beside the limit fields, Retry-After and "
        "X-Request-Id, which it always may.",
    )
    credentials: Flag = preset(False, False, None, "true lets a page send cookies.")
    max_age_ms: DurationOrZeroMs = duration(
        "10m", "max_age", "How long a browser may remember a preflight; 0s asks every time."
    )

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.credentials and "*" in self.origins:
            raise ValueError(
                "every page could act as its visitor: origins is * and credentials true; "
                "name the origins"
            )
        return self


def _parse_answer_status(value: object) -> int:
    status = units.parse_integer(value)
    if not 200 <= status <= 599:
        raise UnitError(value, "not the status of an answer; write 200 to 599")
    return status


class RespondSpec(Section):
    """An answer without an upstream: maintenance, a redirect, robots.txt. Free, and without key."""

    status: Annotated[
        int,
        BeforeValidator(_parse_answer_status),
        WithJsonSchema(
            {"anyOf": [{"type": "integer", "minimum": 200, "maximum": 599}, _REFERENCE]}
        ),
    ] = preset(200, 200, None, "Status of the answer.")
    headers: dict[AnswerField, AnswerValue] = Field(
        default_factory=dict, description="Fields of the answer; {path} and the like are filled in."
    )
    body: str | None = Field(default=None, description="Its text; Content-Type text/plain.")
    json_: Any = Field(
        default=None, alias="json", description="Its body as JSON; Content-Type application/json."
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.body is not None and self.json_ is not None:
            raise ValueError("body and json are one too many; remove one of the two")
        content = self.content
        if len(content) > MAX_ANSWER:
            raise ValueError(f"the body is longer than {MAX_ANSWER} bytes; serve it upstream")
        if content and self.status in (204, 205, 304):
            raise ValueError(f"an answer {self.status} has no body; remove it")
        if self.status in (301, 302, 303, 307, 308) and "location" not in self.headers:
            raise ValueError(f"a redirect ({self.status}) needs headers: {{location: …}}")
        return self

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        if self.json_ is not None:
            return orjson.dumps(self.json_, default=lambda number: orjson.Fragment(f"{number:f}"))
        return (self.body or "").encode()


def _parse_max_body(value: object) -> int:
    if isinstance(value, str) and value.strip() == "unlimited":
        return UNLIMITED
    try:
        return units.parse_size(value)
    except UnitError as error:
        raise UnitError(value, f"{error.reason}; or unlimited") from None


MaxBody = Annotated[
    int,
    BeforeValidator(_parse_max_body),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": units.SIZE_PATTERN},
                {"const": "unlimited"},
                _REFERENCE,
            ]
        }
    ),
]
UpstreamHost = Annotated[
    str,
    _parse_any(
        lambda text: text.lower() if _UPSTREAM_HOST.fullmatch(text.lower()) else None,
        "not a host; write preserve, or a name such as api.internal or api.internal:8080",
    ),
    WithJsonSchema(_TEXT),
]


class RuleKeys(Section):
    """The keys of a route that change requests and answers."""

    add_prefix: Prefix | None = Field(
        default=None, description="Put before the path, once strip_prefix is taken off."
    )
    rewrite: RewriteSpec | None = Field(default=None, description="Another path upstream.")
    host: UpstreamHost | None = Field(
        default=None,
        description="Host that the upstream gets: preserve is the client's, a name is that; the "
        "one in its URL by default.",
    )
    request_headers: RequestHeaderSpec | None = Field(
        default=None, description="Changes of the fields that go upstream."
    )
    response_headers: AnswerHeaderSpec | None = Field(
        default=None, description="Changes of the fields of the upstream's answers."
    )
    cors: CorsSpec | None = Field(
        default=None, description="Pages that may call the route; none by default."
    )
    respond: RespondSpec | None = Field(
        default=None, description="The answer, instead of an upstream."
    )
    max_body: MaxBody | None = Field(
        default=None,
        description="Size of a request's body (413), or unlimited; gateway.client.max_body by "
        "default.",
    )
    encoded_slash: Literal["refuse", "allow"] = Field(
        default="refuse",
        description="%2F and %5C in the path: refuse answers 400, allow passes them on.",
    )
