"""Waiting for a condition. No test sleeps for an amount of time it hopes is enough."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T], deadline_s: float = 10.0, what: str = "the condition"
) -> T:
    """Poll until `predicate()` is true and return what it returned.

    An exception of the predicate counts as "not yet"; the last one is shown when time is up.
    """
    end = time.monotonic() + deadline_s
    error: Exception | None = None
    while True:
        try:
            value = predicate()
            error = None
            if value:
                return value
        except Exception as caught:  # a server that is not up yet raises whatever it likes
            error = caught
        if time.monotonic() >= end:
            raise AssertionError(f"{what} did not come true within {deadline_s} s") from error
        time.sleep(0.02)


async def wait_until_async(
    predicate: Callable[[], T | Awaitable[T]],
    deadline_s: float = 10.0,
    what: str = "the condition",
) -> T:
    """`wait_until` on an event loop; the predicate may be a coroutine function."""
    end = time.monotonic() + deadline_s
    error: Exception | None = None
    while True:
        try:
            result = predicate()
            value = await result if isinstance(result, Awaitable) else result
            error = None
            if value:
                return value
        except Exception as caught:
            error = caught
        if time.monotonic() >= end:
            raise AssertionError(f"{what} did not come true within {deadline_s} s") from error
        await asyncio.sleep(0.02)


def free_port() -> int:
    """A TCP port free on 127.0.0.1 a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
