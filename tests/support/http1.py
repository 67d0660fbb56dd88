"""A client of raw bytes for black-box tests: sends what it is given, reads strictly.

It forgives nothing: an answer that a lenient client would mend (a bare LF, a wrong chunk size, a
body shorter than announced, bytes after the end) is an error here.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

DEADLINE_S = 20.0

_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*\Z", re.DOTALL)
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_NO_BODY = (204, 304)


class Malformed(AssertionError):
    """What arrived is no HTTP/1.1 answer."""


class Cut(Exception):
    """The connection ended before the answer did; `partial` is what there was of the body."""

    def __init__(self, what: str, answer: Answer | None = None, partial: bytes = b"") -> None:
        super().__init__(what)
        self.answer = answer
        self.partial = partial


@dataclass
class Answer:
    """One final answer. Field names are in lower case, order and repetitions kept.

    `framing` is `none`, `length`, `chunked` or `close`.
    """

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    framing: str = "none"
    interim: list[int] = field(default_factory=list)
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def get(self, name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self.fields if key == wanted]

    @property
    def says_close(self) -> bool:
        return any("close" in value.lower() for value in self.get("connection"))


class Connection:
    """One client connection. Every wait ends after `deadline_s` with TimeoutError."""

    def __init__(
        self,
        port: int,
        deadline_s: float = DEADLINE_S,
        receive_buffer: int = 0,
        source: str = "",
    ) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if source:
            self.sock.bind((source, 0))
        self.sock.settimeout(deadline_s)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline_s = deadline_s
        self._buffer = b""
        self._ended = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Sends; a peer that has closed already shows when its answer is read."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def exchange(self, request: bytes, method: str = "") -> Answer:
        self.send(request)
        return self.answer(method or request.split(b" ", 1)[0].decode("latin-1"))

    def answer(self, method: str = "GET") -> Answer:
        """Reads one final answer to a request of this method.

        Raises:
            Cut: the connection ended before the answer did.
            Malformed: what came is no answer.
        """
        interim: list[int] = []
        while True:
            answer = self._head()
            if answer.status >= 200:
                break
            interim.append(answer.status)
            if answer.status == 101:
                break
        answer.interim = interim
        self._body(answer, method)
        return answer

    def ended(self) -> bytes:
        """Waits for the end of the connection; returns what came before it."""
        while self._more():
            pass
        rest, self._buffer = self._buffer, b""
        return rest

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing arrives for so long: for what must not happen, so kept short."""
        if self._buffer or self._ended:
            return False
        self.sock.settimeout(seconds)
        try:
            return not self._more() and not self._ended
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(self._deadline_s)

    # Reading

    def _more(self) -> bool:
        if self._ended:
            return False
        end = time.monotonic() + self._deadline_s
        try:
            data = self.sock.recv(262_144)
        except ConnectionResetError:
            data = b""
        if time.monotonic() > end:
            raise TimeoutError
        self._ended = not data
        self._buffer += data
        return bool(data)

    def line(self) -> bytes:
        """Reads one line; returns it without its end."""
        while (at := self._buffer.find(b"\n")) < 0:
            if not self._more():
                raise Cut(f"the connection ended after {self._buffer!r}")
        line, self._buffer = self._buffer[: at + 1], self._buffer[at + 1 :]
        if not line.endswith(b"\r\n"):
            raise Malformed(f"a line ends without CR: {line!r}")
        return line[:-2]

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._more():
                raise Cut("the body is shorter than announced", None, self._buffer)
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _fields(self) -> Iterator[tuple[bytes, bytes]]:
        while line := self.line():
            match = _FIELD.match(line)
            if match is None or _FORBIDDEN.search(match[2]):
                raise Malformed(f"no field: {line!r}")
            yield match[1].lower(), match[2]

    def _head(self) -> Answer:
        line = self.line()
        match = _STATUS_LINE.match(line)
        if match is None:
            raise Malformed(f"no status line: {line!r}")
        return Answer(int(match[1]), list(self._fields()))

    def _body(self, answer: Answer, method: str) -> None:
        lengths = [value for name, value in answer.fields if name == b"content-length"]
        codings = [value for name, value in answer.fields if name == b"transfer-encoding"]
        if len(lengths) > 1 or len(codings) > 1 or (lengths and codings):
            raise Malformed(f"ambiguous framing: {answer.fields}")
        if lengths and not lengths[0].isdigit():
            raise Malformed(f"content-length: {lengths[0]!r}")
        if codings and codings[0].lower() != b"chunked":
            raise Malformed(f"transfer-encoding: {codings[0]!r}")
        if answer.status == 101 or answer.status in _NO_BODY or method == "HEAD":
            return
        parts: list[bytes] = []
        try:
            if codings:
                answer.framing = "chunked"
                self._chunks(answer, parts)
            elif lengths:
                answer.framing = "length"
                parts.append(self._exactly(int(lengths[0])))
            else:
                answer.framing = "close"
                parts.append(self.ended())
        except Cut as cut:
            raise Cut(str(cut), answer, b"".join(parts) + cut.partial) from None
        answer.body = b"".join(parts)

    def _chunks(self, answer: Answer, parts: list[bytes]) -> None:
        while True:
            line = self.line()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line):
                raise Malformed(f"no chunk size: {line!r}")
            size = int(line, 16)
            if not size:
                answer.trailers = list(self._fields())
                return
            parts.append(self._exactly(size))
            if self.line():
                raise Malformed("a chunk is longer than its size")


def ask(port: int, request: bytes, method: str = "") -> Answer:
    """One request on a connection of its own."""
    with Connection(port) as connection:
        return connection.exchange(request, method)
