"""Server-sent events as they pass: fields of the JSON in them, and how many there were.

Lines end in LF, CR LF or CR, and events, lines and line ends may be cut anywhere. What is held is
one event at most, up to a limit; a longer one is counted and not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from core.cost import FieldPath
from gateway.cost.fields import MISSING, extract

# What OpenAI's API and those like it end a stream with: all that was to come has come.
DONE: Final = b"[DONE]"
_BOM: Final = b"\xef\xbb\xbf"


class SseReader:
    """Reads one stream.

    `values[n]` is what the last event that has it says at `paths[n]`, else `MISSING`; `since[n]` is
    how many events came after it. `done` is whether the stream said that it is complete; `too_long`
    whether an event was not read.
    """

    __slots__ = (
        "_after_cr",
        "_data",
        "_length",
        "_limit",
        "_needles",
        "_overlong",
        "_paths",
        "_rest",
        "_started",
        "done",
        "since",
        "too_long",
        "values",
    )

    def __init__(self, paths: Sequence[FieldPath], limit: int) -> None:
        self._paths = paths
        # A document without the last key of any path need not be parsed.
        self._needles = [
            path[-1].encode() if path[-1].isascii() and path[-1].isidentifier() else b""
            for path in paths
        ]
        self._limit = limit
        self._rest: list[bytes] = []  # of the line that is not at its end
        self._data: list[bytes] = []  # of the event
        self._length = 0  # of both
        self._overlong = False
        self._after_cr = False
        self._started = False
        self.values: list[Any] = [MISSING] * len(paths)
        self.since = [0] * len(paths)
        self.done = False
        self.too_long = False

    def feed(self, piece: bytes) -> None:
        """The next bytes of the stream."""
        if self._after_cr and piece:
            self._after_cr = False
            if piece[0] == 10:
                piece = piece[1:]
        if b"\r" in piece:
            self._after_cr = piece[-1] == 13
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in piece:
            self._keep(piece)
            return
        first, *lines = piece.split(b"\n")
        self._keep(first)
        rest, self._rest = self._rest, []
        self._line(rest[0] if len(rest) == 1 else b"".join(rest))
        last = lines.pop()
        for line in lines:
            self._length += len(line)
            self._line(line)
        self._keep(last)

    def end(self) -> None:
        """The stream is over: what follows the last empty line is an event, too."""
        rest, self._rest = self._rest, []
        self._line(b"".join(rest))
        self._line(b"")

    def _keep(self, part: bytes) -> None:
        if not part:
            return
        self._length += len(part)
        if self._length > self._limit:
            self._overlong = True
        if self._overlong:
            # Whether the line is empty is all that still matters.
            self._rest, self._data = [b"."], []
        else:
            self._rest.append(part)

    def _line(self, line: bytes) -> None:
        if not self._started:
            self._started = True
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch()
        elif self._overlong or self._length > self._limit:
            self._overlong = True
            self._data = []
        elif line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            self._data.append(b"")
        else:
            self._length -= len(line)  # a comment, or a field that is not kept

    def _dispatch(self) -> None:
        data, overlong = self._data, self._overlong
        self._data, self._length, self._overlong = [], 0, False
        if overlong:
            self.too_long = True
            self._count()
        elif data:
            text = data[0] if len(data) == 1 else b"\n".join(data)
            if text == DONE:
                self.done = True
                return
            self._count()
            self._read(text)

    def _count(self) -> None:
        self.since = [count + 1 for count in self.since]

    def _read(self, text: bytes) -> None:
        for needle in self._needles:
            if needle in text:
                break
        else:
            return
        found = extract(text, self._paths)
        for at, value in enumerate(found or ()):
            if value is not MISSING:
                self.values[at] = value
                self.since[at] = 0
