"""An upstream that a test plays line by line, and a client that may leave in the middle."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

_DEADLINE_S = 30
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"connection: close\r\n\r\n"
)


class Wire:
    """A blocking connection that is read up to something."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_DEADLINE_S)
        self._sock = sock
        self.received = b""

    def until(self, marker: bytes) -> bytes:
        """All that was received, once `marker` is in it."""
        while marker not in self.received:
            try:
                data = self._sock.recv(65_536)
            except TimeoutError:
                raise AssertionError(f"no {marker!r}: {self.received!r}") from None
            if not data:
                raise AssertionError(f"closed before {marker!r}: {self.received!r}")
            self.received += data
        return self.received

    def to_the_end(self) -> bytes:
        """All that was received, once the other side has closed, in whatever way."""
        try:
            while data := self._sock.recv(65_536):
                self.received += data
        except ConnectionError:
            pass
        return self.received

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Answering(Wire):
    """A request that has arrived at the upstream."""

    def respond(self, body: bytes, *headers: bytes, status: bytes = b"200 OK") -> None:
        """A whole answer, after which the connection is closed."""
        lines = [b"HTTP/1.1 " + status, *headers, b"content-length: %d" % len(body)]
        self.send(b"\r\n".join([*lines, b"connection: close", b"", b""]) + body)
        self.close()

    def chunk(self, data: bytes) -> None:
        """A piece of a chunked answer that `SSE_HEAD` has begun; empty for its end."""
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, text: str) -> None:
        """One server-sent event."""
        self.chunk(f"data: {text}\n\n".encode())


class ScriptedUpstream(Wire):
    """Listens; each request is taken and answered by the test."""

    def __init__(self) -> None:
        super().__init__(socket.create_server(("127.0.0.1", 0)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._sock.getsockname()[1]}"

    def take(self) -> Answering:
        """The next request, whose head is in `received`."""
        conn, _ = self._sock.accept()
        taken = Answering(conn)
        taken.until(b"\r\n\r\n")
        return taken


def ask(port: int, path: str, key: str, *headers: str) -> Wire:
    """Sends a GET; the answer is to be read."""
    client = Wire(socket.create_connection(("127.0.0.1", port)))
    lines = [f"GET {path} HTTP/1.1", "host: t", f"authorization: Bearer {key}", *headers, "", ""]
    client.send("\r\n".join(lines).encode())
    return client
