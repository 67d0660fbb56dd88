"""What a row of the hardening table is made of. The rows themselves are in `rows_*.py`.

A row says what happens to some raw requests that mean the same trick. The table of
docs/hardening.md is printed from the rows, and each of their requests is sent as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tests.support.http1 import Answer
from tests.support.recorder import Seen

# Filled in when a request is sent.
KEY = b"@KEY@"
HOST = b"@HOST@"
VICTIM = b"@VICTIM@"  # an address that listens, and that nobody may ever be sent to

Check = Callable[[Seen, Answer], None]


@dataclass(frozen=True)
class Refused:
    """Answered by the gateway: the application sees nothing, and nothing is counted.

    `statuses` are those allowed. Without `closed` the connection may be kept, or closed.
    `may_count` is for what goes wrong in a body after the request was admitted.
    """

    statuses: tuple[int, ...]
    closed: bool = True
    may_count: bool = False

    def __str__(self) -> str:
        shown = " or ".join(map(str, self.statuses))
        return f"{shown}, connection closed" if self.closed else shown


@dataclass(frozen=True)
class Relayed:
    """Passed on as one request, counted once, answered 200 (`status`).

    `method` and `target` are what the application sees. Without `kept` the connection is closed
    after the answer.
    """

    happens: str
    check: Check | None = None
    target: str = "/echo"
    body: bytes | None = None
    kept: bool = True
    status: int = 200
    interim: tuple[int, ...] = ()
    times: int = 1

    def __str__(self) -> str:
        return self.happens


@dataclass(frozen=True)
class Path:
    """A path that spells, or nearly spells, `/paid/dear`, which costs 100 credits instead of 1.

    With `same` it has to be refused or cost 100. Without, it may also be a path of its own: passed
    on byte for byte and paid as what it says.
    """

    happens: str
    same: bool

    def __str__(self) -> str:
        return self.happens


@dataclass(frozen=True)
class Told:
    """What takes more than one request to show: `test` is the function that does."""

    happens: str
    test: str

    def __str__(self) -> str:
        return self.happens


Outcome = Refused | Relayed | Path | Told


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    outcome: Outcome
    requests: Mapping[str, bytes]
    note: str = ""


ROWS: list[Row] = []


def row(
    section: str,
    what: str,
    outcome: Outcome,
    requests: Mapping[str, bytes] | Iterable[bytes] | bytes,
    note: str = "",
) -> None:
    """Adds a row. Requests without a name are numbered."""
    if isinstance(requests, bytes):
        requests = {"": requests}
    elif not isinstance(requests, Mapping):
        requests = {str(number): raw for number, raw in enumerate(requests, 1)}
    ROWS.append(Row(section, what, outcome, requests, note))


def told(section: str, what: str, happens: str, test: str) -> None:
    """Adds a row that a test of its own shows."""
    ROWS.append(Row(section, what, Told(happens, test), {}))


def req(
    line: bytes = b"GET /echo HTTP/1.1",
    *fields: bytes,
    body: bytes = b"",
    host: bytes | None = HOST,
    key: bytes | None = KEY,
) -> bytes:
    """A request with Host and key, the given lines of fields, and whatever follows the head."""
    lines = [line]
    if host is not None:
        lines.append(b"Host: " + host)
    if key is not None:
        lines.append(b"X-API-Key: " + key)
    return b"\r\n".join([*lines, *fields, b"", body])


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return req(b"POST /echo HTTP/1.1", *fields, body=body)
