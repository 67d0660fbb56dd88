"""Names of upstreams, resolved again and again in the background.

Without `dns` each new connection resolves the name anew, as it always did. With it, every address
is a target of its own: balanced, checked and ejected by itself. When a look-up fails, or finds
nothing, the addresses that were known stay.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

# A resolver is a function: host and port to addresses as text. What it raises is a failed look-up.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_TIMEOUT_S: Final = 5.0
_JITTER: Final = 0.1
# Until a name was resolved once, ask more often: without addresses each connection asks anyway.
_FIRST_RETRY_S: Final = 1.0


async def system(host: str, port: int) -> Sequence[str]:
    """The system's resolver, hosts file and all: every A and AAAA address.

    Raises:
        OSError: no such name, or no answer.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_name(host: str) -> bool:
    """Whether there is anything to resolve."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host)
    return False


class Resolution:
    """Keeps one name resolved.

    Args:
        found: called with the addresses, in a stable order, whenever they changed.
        failed: called with the reason when a look-up fails after one that did not.
        mended: called when it succeeds again.
    """

    def __init__(
        self,
        host: str,
        port: int,
        refresh_s: float,
        resolver: Resolver,
        *,
        found: Callable[[tuple[str, ...]], object],
        failed: Callable[[str], object],
        mended: Callable[[], object],
    ) -> None:
        self._host = host
        self._port = port
        self._refresh_s = refresh_s
        self._resolver = resolver
        self._found = found
        self._failed = failed
        self._mended = mended
        self._known: tuple[str, ...] = ()
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"resolve {self._host}")

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        while True:
            await self._look_up()
            wait = self._refresh_s if self._known else min(self._refresh_s, _FIRST_RETRY_S)
            await asyncio.sleep(wait * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311

    async def _look_up(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                addresses = tuple(sorted(set(await self._resolver(self._host, self._port))))
            fault = "" if addresses else "no addresses"
        except TimeoutError:
            fault = f"no answer within {_TIMEOUT_S:g} s"
        except Exception as error:  # whatever a resolver raises: the addresses known stay
            fault = str(error) or type(error).__name__
        if fault:
            if not self._failing:
                self._failing = True
                self._failed(fault)
            return
        if self._failing:
            self._failing = False
            self._mended()
        if addresses != self._known:
            self._known = addresses
            self._found(addresses)
