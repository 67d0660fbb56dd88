"""An exchange without a client: it remembers what was answered."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.http.exchange import Exchange
from gateway.http.message import Header, Request


class RecordingExchange(Exchange):
    """`answers` are (status, headers, body); `aborted` counts."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.answers: list[tuple[int, list[Header], bytes]] = []
        self.aborted = 0

    def respond(
        self, status: int, headers: Sequence[Header], body: bytes = b"", length: int = -1
    ) -> None:
        self.answers.append((status, list(headers), body))
        self.started = self.ended = True

    def start(self, status: int, headers: Sequence[Header], length: int = -1) -> None:
        self.answers.append((status, list(headers), b""))
        self.started = True

    def write(self, data: bytes) -> None:
        status, headers, body = self.answers[-1]
        self.answers[-1] = (status, headers, body + data)

    def end(self, trailers: Sequence[Header] = ()) -> None:
        self.ended = True

    def inform(self, status: int, headers: Sequence[Header]) -> None: ...

    def abort(self) -> None:
        self.aborted += not self.ended
        self.ended = True

    @property
    def must_drain(self) -> bool:
        return False

    async def drain(self) -> None: ...

    async def read(self) -> bytes:
        return b""
