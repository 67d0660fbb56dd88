"""What the server knows of a client's connection, whatever protocol is spoken on it."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable
from typing import Final

from mypy_extensions import mypyc_attr

# How long a connection that we have closed for writing is read, so that the client reads our answer
# and not a reset.
LINGER_S: Final = 2
# And how long a client may take nothing of what it is still owed.
_UNREAD_S: Final = 30


@mypyc_attr(allow_interpreted_subclasses=True)  # compiled: see gateway/compiled.py
class Connection(asyncio.Protocol):
    """`deadline` is in the server's ticks; 0 while nothing is expected of the client."""

    __slots__ = ("deadline", "unsent")

    deadline: int
    unsent: int  # bytes that a closing connection had left when it was last looked at

    @property
    @abstractmethod
    def idle(self) -> bool:
        """No request is being answered or received."""

    @property
    @abstractmethod
    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """The handlers of the requests that are being answered."""

    @abstractmethod
    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""

    @abstractmethod
    def leave(self) -> None:
        """The server drains: the client should send its next requests elsewhere."""

    @abstractmethod
    def close(self) -> None:
        """No more answers: close, but let the client read what was written first."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once; what was not sent is lost."""

    @abstractmethod
    def expire(self) -> None:
        """The deadline has passed."""


def still_sends(
    connection: Connection, transport: asyncio.Transport, tick: int, idle_s: int
) -> bool:
    """Whether a closing connection has sent something since it was last looked at, and has more: a
    slow client gets its answer to the end. It then has a new deadline.

    Args:
        tick: the server's, now.
        idle_s: how long its connections may be idle.
    """
    left = transport.get_write_buffer_size()
    if not left or left == connection.unsent:
        return False
    connection.unsent = left
    connection.deadline = tick + max(min(_UNREAD_S, idle_s), LINGER_S + 1)
    return True


def descriptor(transport: asyncio.Transport | None) -> int:
    """That of a transport's socket; -1 without one."""
    sock = None if transport is None else transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())
