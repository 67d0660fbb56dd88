"""The scalar field types of the models: each parses human text and describes itself to JSON Schema.

A validator raises `UnitError`, so that a message carries what was wrong and what is accepted; the
loader adds the path and the value. `${...}` is accepted by every schema, as an editor cannot know
what the environment will say.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from core.config import units
from core.config.units import UnitError

NAME_PATTERN = r"^[a-z][a-z0-9_]{0,62}$"
_NAME = re.compile(NAME_PATTERN)
_HOST = re.compile(r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?$")
_METHOD = re.compile(r"^[A-Z][A-Z-]{1,31}$")
_HEADER = re.compile(r"^[a-z0-9!#$%&'*+.^_`|~-]{1,64}$")
_STATUS = re.compile(r"^[2-5](xx|[0-9][0-9])$")
_LONGEST_SOCKET_PATH = 107
_PATH = re.compile(r"^/[^\s?#*]*$")
# What a request's path is matched against is decoded and in normal form, so a route's is, too.
_NOT_NORMAL = re.compile(r"[%;\\\x00-\x1f\x7f]|//|/\.{1,2}(?:/|$)")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# An environment reference is text until it is filled in, whatever the field's own type is.
_REFERENCE = {"type": "string", "pattern": r"\$\{"}


def _json(*variants: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*variants, _REFERENCE]})


def _text(pattern: str | None = None, **extra: Any) -> dict[str, Any]:
    return {"type": "string", **({"pattern": pattern} if pattern else {}), **extra}


def preset(default: object, text: Any, alias: str | None, description: str) -> Any:
    """A `Field` whose default is `default` in code and `text` (human spelling) in the schema."""
    return Field(
        default=default, alias=alias, description=description, json_schema_extra={"default": text}
    )


def duration(text: str, alias: str, description: str) -> Any:
    """A `Field` for a duration named `alias` in the file, with a default such as `50ms`."""
    return preset(units.parse_duration(text), text, alias, description)


class Address(NamedTuple):
    """A TCP address to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(value: object) -> Address:
    """`127.0.0.1:8080` or `[::1]:8080`; `localhost` is 127.0.0.1.

    Other names are refused: what they resolve to is not known before the socket is opened.

    Raises:
        UnitError: anything else.
    """
    if isinstance(value, Address):
        return value
    reason = "not an address; write host:port, such as 127.0.0.1:8080 or [::1]:8080"
    host, colon, port = value.strip().rpartition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not (port.isascii() and port.isdigit()) or len(port) > 5:
        raise UnitError(value, reason)
    if not 1 <= int(port) <= 65_535:
        raise UnitError(value, "the port must be from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise UnitError(value, reason) from None
    elif host == "localhost":
        host = "127.0.0.1"
    else:
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise UnitError(value, reason) from None
    return Address(host, int(port))


def parse_network(value: object) -> Network:
    """A CIDR such as `10.0.0.0/8`; one address is a network of one.

    Raises:
        UnitError: not a network, or with bits set outside its mask.
    """
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if not isinstance(value, str):
        raise UnitError(value, "not a network; write a CIDR, such as 10.0.0.0/8")
    try:
        return ipaddress.ip_network(value.strip())
    except ValueError:
        pass
    try:
        whole = ipaddress.ip_network(value.strip(), strict=False)
    except ValueError:
        raise UnitError(value, "not a network; write a CIDR, such as 10.0.0.0/8") from None
    raise UnitError(value, f"an address inside a network; write {whole} for the network")


def parse_upstream_url(value: object) -> str:
    """`http://host:port`, `https://host:port` or `unix:///path/of/a.sock`.

    Without credentials, path or query; a final `/` is dropped.

    Raises:
        UnitError: anything else.
    """
    accepted = "write http://host:port, https://host:port or unix:///path/of/a.sock"
    if not isinstance(value, str):
        raise UnitError(value, f"not a URL; {accepted}")
    text = value.strip()
    if text.lower().startswith("unix:"):
        return _unix_url(value, text)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UnitError(value, f"not a URL; {accepted}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UnitError(value, f"not the URL of an upstream; {accepted}")
    if parts.username is not None or parts.password is not None:
        raise UnitError(value, f"credentials do not belong in an upstream URL; {accepted}")
    if parts.path not in ("", "/") or "?" in text or "#" in text:
        raise UnitError(value, f"a path or a query does not belong in an upstream URL; {accepted}")
    if ":" in parts.hostname:
        try:
            ipaddress.IPv6Address(parts.hostname)
        except ValueError:
            raise UnitError(value, f"not a URL; {accepted}") from None
    elif not _HOST.fullmatch(parts.hostname):
        raise UnitError(value, f"not a URL; {accepted}")
    return text.removesuffix("/")


def _unix_url(value: str, text: str) -> str:
    path = text[5:].removeprefix("//")
    if text[5:7] != "//" or not path.startswith("/") or path.endswith("/"):
        raise UnitError(
            value, "not a socket; write unix:// and its absolute path: unix:///run/a.sock"
        )
    # What the kernel's address holds, with the NUL that ends it.
    if len(path.encode()) > _LONGEST_SOCKET_PATH or not path.isprintable():
        raise UnitError(value, f"a socket's path has at most {_LONGEST_SOCKET_PATH} bytes; move it")
    return f"unix://{path}"


def store_url(schemes: Mapping[str, str]) -> Callable[[object], str | None]:
    """A validator for a store's URL; empty text is unset. Its messages never hold the URL.

    `schemes` maps each accepted scheme to the one that the result begins with.
    """

    def parse(value: object) -> str | None:
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        scheme, found, rest = value.strip().partition("://") if isinstance(value, str) else [""] * 3
        if found and scheme in schemes:
            return f"{schemes[scheme]}://{rest}"
        kind = scheme.partition("+")[2] if found else ""
        if kind in ("cluster", "sentinel"):
            reason = f"{kind} URLs are not supported yet; write that of one server, such as "
            raise UnitError("(hidden)", reason + "redis://host:6379/0")
        accepted = ", ".join(f"{scheme}://" for scheme in schemes)
        raise UnitError("(hidden)", f"not a URL of this store; it starts with {accepted}")

    return parse


def empty_as_none(value: object) -> object:
    """Empty text, which an unset environment variable leaves behind, is no value."""
    return None if isinstance(value, str) and not value.strip() else value


def integer(low: int, high: int | None = None) -> Callable[[object], int]:
    """A validator for an integer from `low` to `high`."""

    def parse(value: object) -> int:
        number = units.parse_integer(value)
        if number < low or (high is not None and number > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UnitError(value, f"out of range; write a whole number, {span}")
        return number

    return parse


def _parse_workers(value: object) -> int | None:
    if value is None or value == "auto":
        return None
    try:
        return integer(1)(value)
    except UnitError:
        raise UnitError(value, "not a number of workers; write auto or 1 or more") from None


def _parse_flag(value: object) -> bool:
    # Text too: ${ACCESS_LOG:-false} is text once it is filled in.
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise UnitError(value, "not a switch; write true or false")


def _parse_positive_duration(value: object) -> int:
    ms = units.parse_duration(value)
    if ms < 1:
        raise UnitError(value, "too short; write at least 1ms")
    return ms


def parse_name(value: object) -> str:
    """A name that identifies counters: `[a-z][a-z0-9_]{0,62}`.

    Raises:
        UnitError: anything else.
    """
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise UnitError(
        value,
        "not a name; write a lower-case letter, then up to 62 lower-case letters, digits or _",
    )


def parse_path(value: object) -> str:
    """A path to match: exact, such as `/search`, or a prefix, such as `/weather/*`.

    Raises:
        UnitError: anything else.
    """
    if isinstance(value, str):
        stem = value.removesuffix("*") if value.endswith("/*") else value
        if re.search(r"[%;\\]", stem):
            raise UnitError(value, "not in normal form; write it decoded, without %, ; and \\")
        if _PATH.fullmatch(stem) and not _NOT_NORMAL.search(stem):
            return value
    raise UnitError(value, "not a path; write /exact, or /prefix/* for everything below it")


def _parse_prefix(value: object) -> str:
    if isinstance(value, str) and _PATH.fullmatch(value) and not value.endswith("/"):
        if _NOT_NORMAL.search(value):
            raise UnitError(
                value, "not in normal form; write it decoded, without %, ;, \\, // and dots"
            )
        return value
    raise UnitError(value, "not a prefix; write /name, without / at the end")


def _parse_status(value: object) -> str:
    text = str(value).lower() if isinstance(value, str | int) else ""
    if _STATUS.fullmatch(text):
        return text
    raise UnitError(value, "not a status; write a code such as 404, or a class such as 2xx")


def _pattern(
    pattern: re.Pattern[str], change: Callable[[str], str], reason: str
) -> BeforeValidator:
    def parse(value: object) -> str:
        text = change(value.strip()) if isinstance(value, str) else ""
        if not pattern.fullmatch(text):
            raise UnitError(value, reason)
        return text

    return BeforeValidator(parse)


_INT = {"type": "integer"}
DurationMs = Annotated[
    int, BeforeValidator(_parse_positive_duration), _json(_text(units.DURATION_PATTERN))
]
DurationOrZeroMs = Annotated[
    int, BeforeValidator(units.parse_duration), _json(_text(units.DURATION_PATTERN))
]
Size = Annotated[
    int,
    BeforeValidator(units.parse_size),
    _json({**_INT, "minimum": 0}, _text(units.SIZE_PATTERN)),
]
Rate = Annotated[
    tuple[int, int], BeforeValidator(units.parse_rate), _json(_text(units.RATE_PATTERN))
]
Quantity = Annotated[
    Decimal,
    BeforeValidator(units.parse_quantity),
    _json({"type": "number", "minimum": 0}, _text(units.QUANTITY_PATTERN)),
]
Count = Annotated[
    int,
    BeforeValidator(integer(1)),
    _json({**_INT, "minimum": 1}, _text(units.INTEGER_PATTERN)),
]
# Lua's stack bounds what a script can hand to one command.
BatchSize = Annotated[
    int,
    BeforeValidator(integer(1, 1_000)),
    _json({**_INT, "minimum": 1, "maximum": 1_000}, _text(units.INTEGER_PATTERN)),
]
CountOrZero = Annotated[
    int,
    BeforeValidator(integer(0)),
    _json({**_INT, "minimum": 0}, _text(units.INTEGER_PATTERN)),
]
Decimals = Annotated[
    int, BeforeValidator(integer(0, 6)), _json({**_INT, "minimum": 0, "maximum": 6})
]
# None is `auto`: one worker a core that the process may use.
Workers = Annotated[
    int | None, PlainValidator(_parse_workers), _json({"const": "auto"}, {**_INT, "minimum": 1})
]
Flag = Annotated[bool, BeforeValidator(_parse_flag), _json({"type": "boolean"})]
Listen = Annotated[
    Address, PlainValidator(parse_address), WithJsonSchema(_text(examples=["127.0.0.1:8080"]))
]
Cidr = Annotated[
    Network, PlainValidator(parse_network), WithJsonSchema(_text(examples=["10.0.0.0/8"]))
]
UpstreamUrl = Annotated[
    str,
    BeforeValidator(parse_upstream_url),
    _json(_text(r"^([Hh][Tt][Tt][Pp][Ss]?|[Uu][Nn][Ii][Xx])://")),
]
Name = Annotated[str, BeforeValidator(parse_name), WithJsonSchema(_text(NAME_PATTERN))]
MatchPath = Annotated[str, BeforeValidator(parse_path), _json(_text(r"^/"))]
Prefix = Annotated[str, BeforeValidator(_parse_prefix), _json(_text(r"^/"))]
Host = Annotated[
    str,
    _pattern(_HOST, str.lower, "not a host; write a name without a port, such as api.example.com"),
    WithJsonSchema(_text()),
]
Method = Annotated[
    str,
    _pattern(_METHOD, str.upper, "not a method; write GET, POST, PUT, PATCH, DELETE, …"),
    WithJsonSchema(_text()),
]
StatusClass = Annotated[
    str,
    BeforeValidator(_parse_status),
    _json({**_INT, "minimum": 200, "maximum": 599}, _text(r"^[2-5]([xX]{2}|[0-9]{2})$")),
]
HeaderName = Annotated[
    str,
    _pattern(_HEADER, str.lower, "not a header name; write letters, digits and -"),
    WithJsonSchema(_text()),
]
