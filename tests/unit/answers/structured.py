"""A strict RFC 9651 parser for what the tests need: Lists of Items with Parameters."""

from __future__ import annotations

import re

_KEY = re.compile(r"[a-z*][a-z0-9_\-.*]*")
_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*")
_INTEGER = re.compile(r"-?[0-9]{1,15}")
_STRING = re.compile(r'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')


class Token(str):
    """Told apart from a String: the two are different types in the RFC."""


Bare = str | int | Token | bool
Item = tuple[Bare, dict[str, Bare]]


def parse_list(field: bytes) -> list[Item]:
    """The members of a List field value; ValueError when it is not one."""
    text = field.decode("ascii").strip(" ")
    items: list[Item] = []
    while text:
        value, text = _bare(text)
        parameters: dict[str, Bare] = {}
        while text.startswith(";"):
            text = text[1:].lstrip(" ")
            key = _match(_KEY, text)
            text = text[len(key) :]
            parameter: Bare = True
            if text.startswith("="):
                parameter, text = _bare(text[1:])
            if key in parameters:
                raise ValueError(f"parameter {key} twice")
            parameters[key] = parameter
        items.append((value, parameters))
        text = text.lstrip(" \t")
        if not text:
            return items
        if not text.startswith(","):
            raise ValueError(f"garbage: {text!r}")
        text = text[1:].lstrip(" \t")
        if not text:
            raise ValueError("trailing comma")
    return items


def _match(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.match(text)
    if match is None:
        raise ValueError(f"expected {pattern.pattern} at {text!r}")
    return match[0]


def _bare(text: str) -> tuple[Bare, str]:
    if text.startswith('"'):
        raw = _match(_STRING, text)
        return re.sub(r"\\(.)", r"\1", raw[1:-1]), text[len(raw) :]
    if text[:1].isdigit() or text.startswith("-"):
        raw = _match(_INTEGER, text)
        if text[len(raw) : len(raw) + 1] in (".",) or text[len(raw) : len(raw) + 1].isdigit():
            raise ValueError(f"not an Integer: {text!r}")
        return int(raw), text[len(raw) :]
    raw = _match(_TOKEN, text)
    return Token(raw), text[len(raw) :]
