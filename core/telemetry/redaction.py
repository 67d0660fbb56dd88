"""What must never reach a log, removed in two passes.

1. `redact(event)` walks the fields before rendering: a field whose *name* says secret loses its
   value whatever that is, and text is searched for `password=...`-like assignments.
2. `scrub(line)` searches the rendered bytes for *values* that are secrets wherever they stand:
   API keys, provider keys, bearer tokens, credentials in a URL. Nothing is written without it, so a
   secret inside a traceback, an exception's repr or a header dump is caught as well. Its patterns
   match no quote, backslash or space, so the replacement never breaks a JSON line.

Where the two differ from perfect they err on the side of removing too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_REDACTED_BYTES = REDACTED.encode()

# A nested structure deeper than this is printed as its (redacted) repr: it may contain itself.
_MAX_DEPTH = 6

_SECRET_FIELDS = frozenset(
    {
        "apikey", "auth", "authorization", "connstr", "cookie", "credential", "credentials", "dsn",
        "key", "passphrase", "passwd", "password", "pepper", "pwd", "secret", "secrets", "session",
        "signature", "token",
    }
)  # fmt: skip
# Identifiers of keys are public and wanted in a log; the keys themselves are not.
_PUBLIC_FIELDS = frozenset({"key_id", "key_prefix", "token_type"})
_ABOUT = [[word] for word in ("id", "ids", "count", "prefix", "age", "name", "kind")]

# Any word of a name decides: `x-api-key`, `redis.password`, `webhookSecret`, `pepper_previous`.
_NAME_PART = re.compile(r"[a-z0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# Issued keys (`tg_live_...`), Stripe's (`sk_live_`, `rk_test_`), webhook signing secrets.
_KEY = r"((?:tg|sk|rk|pk)_(?:live|test)_|whsec_)[A-Za-z0-9_.~+/=-]+"
# Up to the last @ of the word: a password may itself contain @, : or /.
_URL_CREDENTIALS = r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s\"'<>\\]*@"
_BEARER = r"\b([Bb]earer|[Bb]asic|BEARER|BASIC)(\s+|%20)[A-Za-z0-9._~+/=-]{8,}"

_AT, _SPACE, _PERCENT = b"@ %"
_SCRUB_KEY = re.compile(_KEY.encode())
_SCRUB_URL = re.compile(_URL_CREDENTIALS.encode())
_SCRUB_BEARER = re.compile(_BEARER.encode())

# The names that are not part of ordinary words may be the tail of one (`webhookSecret=`).
_NAMES = r"""(?:api[_-]?key|authorization|dsn|passphrase|passwd|password|pepper|secret|token
  |(?<![a-z0-9])(?:auth|cookie|key|pwd|signature))(?:_previous)?"""
_QUOTED = r"""[brf]{0,2}(?:\\*"(?:[^"\\]|\\.)*"?|\\*'(?:[^'\\]|\\.)*'?)"""
_ASSIGNMENT = re.compile(
    rf"""(?ix)
    ( (?:authorization|cookie) \\*["']? \s*[:=]\s* b?\\*["']? ) [^\r\n"'\\]+  # a header: its line
    | ( {_NAMES} (?: \\*["'] \s*[:=,]>?\s* | \s*[:=]{{1,2}}>?\s* ) )
      (?: {_QUOTED} | (?:bearer|basic|digest)\s+\S+ | [^\s,;&)}}\]"']+ )
    """
)
# Nothing worth reading is longer; a line of megabytes is somebody's body in the wrong place.
_MAX_TEXT = 64 * 1024


def is_secret_field(name: str) -> bool:
    """Whether a field of this name holds a secret, judged by the words the name is made of."""
    lowered = name.lower()
    if lowered in _PUBLIC_FIELDS:
        return False
    words = _NAME_PART.findall(_CAMEL.sub("_", name).lower())
    # `key_id`, `token_count`: about a secret, not the secret.
    return words[-1:] not in _ABOUT and any(word in _SECRET_FIELDS for word in words)


def redact_text(text: str) -> str:
    """Text without `name=value` secrets, keys, tokens or URL credentials."""
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + "... [truncated]"
    if "=" in text or ":" in text or "," in text:
        text = _ASSIGNMENT.sub(_keep_name, text)
    return scrub(text.encode("utf-8", "backslashreplace")).decode()


def redact(value: Any, depth: int = 0) -> Any:
    """`value` rebuilt of JSON types (dict, list, str, int, float, bool, None) without secrets."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        # orjson takes 64 bits; a longer number is text.
        return int(value) if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return redact_text(bytes(value).decode("utf-8", "backslashreplace"))
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {
                redact_text(name if isinstance(name, str) else repr(name)): (
                    REDACTED
                    if isinstance(name, str | bytes)
                    and not (item is None or isinstance(item, bool))
                    and is_secret_field(_text(name))
                    else redact(item, depth + 1)
                )
                for name, item in value.items()
            }
        if _is_named_pair(value):
            return [redact(value[0], depth + 1), REDACTED]
        if isinstance(value, list | tuple | set | frozenset):
            return [redact(item, depth + 1) for item in value]
    return redact_text(_describe(value))


def scrub(line: bytes) -> bytes:
    """A rendered line without any value that is a secret by its shape.

    The cheap tests come first, for the line of a flood: `int in bytes` is one memchr, and `find`
    takes two thirds of the time of `bytes in bytes`, which first tries its operand as an integer.
    """
    find = line.find
    if find(b"_live_") >= 0 or find(b"_test_") >= 0 or find(b"whsec_") >= 0:
        line = _SCRUB_KEY.sub(rb"\1" + _REDACTED_BYTES, line)
    if _AT in line:
        line = _SCRUB_URL.sub(rb"\1" + _REDACTED_BYTES + b"@", line)
    if _SPACE in line or _PERCENT in line:
        line = _SCRUB_BEARER.sub(rb"\1\2" + _REDACTED_BYTES, line)
    return line


def _is_named_pair(value: Any) -> bool:
    """A `(b"authorization", b"...")` of a header list."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str | bytes)
        and is_secret_field(_text(value[0]))
    )


def _keep_name(match: re.Match[str]) -> str:
    return (match[1] or match[2]) + REDACTED


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode("latin-1")


def _describe(value: Any) -> str:
    try:
        return str(value) if isinstance(value, BaseException) else repr(value)
    except Exception:  # a broken __repr__ must not lose the line it was to appear in
        return f"<{type(value).__name__}: no repr>"
