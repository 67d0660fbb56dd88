"""One request and its answer, as a handler sees them: the same for every protocol of a client.

A handler calls either `respond` once, or `start`, then `write` any number of times, then `end`. An
answer that cannot be completed is given up with `abort`, which its client can tell from a complete
one. None of these waits or fails: what is written to a client that is gone is dropped. Whoever
writes more than a little awaits `drain` while `must_drain` says so.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from mypy_extensions import mypyc_attr

from gateway.http.body import Body
from gateway.http.errors import ClientDisconnected
from gateway.http.message import Header, Request


@mypyc_attr(allow_interpreted_subclasses=True)  # compiled: see gateway/compiled.py
class Exchange:
    """Attributes:
    request: what was asked.
    started: the head of the final answer was written.
    ended: the answer is complete or was given up; nothing more may be written.
    gone: the client is gone.
    on_gone: called once when the client goes before the answer has ended.
    task: the handler's, so that nothing else has to hold it.
    body: of the request; None where it has none.
    expects: the client waits for 100 Continue.
    """

    __slots__ = ("body", "ended", "expects", "gone", "on_gone", "request", "started", "task")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.started = False
        self.ended = False
        self.gone = False
        self.on_gone: Callable[[], object] | None = None
        self.task: asyncio.Task[None] | None = None
        self.body: Body | None = None
        self.expects = False

    @abstractmethod
    def respond(
        self, status: int, headers: Sequence[Header], body: bytes = b"", length: int = -1
    ) -> None:
        """A whole answer. Its Content-Length is that of the body.

        `length`, unless -1, is declared instead where no body is sent: for HEAD and 304.

        Raises:
            ValueError: a field has a line break in it. Nothing was sent.
        """

    @abstractmethod
    def start(self, status: int, headers: Sequence[Header], length: int = -1) -> None:
        """The head of an answer whose body follows; `length` of it in bytes, -1 when unknown.

        Raises:
            ValueError: a field has a line break in it. Nothing was sent.
        """

    @abstractmethod
    def write(self, data: bytes) -> None:
        """A piece of the body."""

    @abstractmethod
    def end(self, trailers: Sequence[Header] = ()) -> None:
        """The body is complete. Trailers are dropped where the framing has no place for them."""

    @abstractmethod
    def inform(self, status: int, headers: Sequence[Header]) -> None:
        """An interim answer (1xx) before the final one; dropped where a client knows none."""

    @abstractmethod
    def abort(self) -> None:
        """Give the answer up. Nothing to do once it has ended."""

    @property
    @abstractmethod
    def must_drain(self) -> bool:
        """The client takes its answer more slowly than it is written."""

    @abstractmethod
    async def drain(self) -> None:
        """Return when there is room again.

        Raises:
            ClientDisconnected: the client is gone.
        """

    @abstractmethod
    async def read(self) -> bytes:
        """The next piece of the request body, of any size; empty at its end.

        A client that waits for 100 Continue is told to go on when this is first called.

        Raises:
            ClientDisconnected: the client went away before the end of the body.
            BadRequest: the body is not framed as it should be.
        """

    @property
    def body_complete(self) -> bool:
        """All of the request body has arrived (`read` may still have pieces of it)."""
        return self.body is None or self.body.complete

    @property
    def trailers(self) -> Sequence[Header]:
        """Trailer fields of the request, once its body is complete."""
        return () if self.body is None else self.body.trailers

    def lose(self) -> None:
        """The client is gone."""
        self.gone = True
        if self.body is not None:
            self.body.fail(ClientDisconnected("the client closed the connection while sending"))
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None and not self.ended:
            on_gone()


@mypyc_attr(allow_interpreted_subclasses=True)
class Tunnel(asyncio.Protocol):
    """What a connection goes on with after `take_over`.

    Attributes:
        task: the handler's, which ends when the tunnel has.
        on_closed: to be called once, when the connection is closed.
    """

    __slots__ = ("on_closed", "task")

    task: asyncio.Task[None] | None
    on_closed: Callable[[], object] | None

    @abstractmethod
    def going_away(self) -> None:
        """The gateway stops: tell both ends in the protocol's own terms (1001), and close."""


Handler = Callable[[Exchange], Coroutine[Any, Any, None]]
