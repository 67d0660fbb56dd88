"""Runs the background's tasks side by side: each goes on after an error, none waits for another.

A task is a round that is repeated. Rounds of tasks that one process at a time should do start only
while the lease is held; a round under way may end after it was lost, as every round is repeatable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError, StoreUnavailableError
from core.telemetry import logs
from reconciler.lease import Lease

_log = logs.get_logger()

# After a failure of a store: soon, since the counts only wait, but not in a tight loop.
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """`round` every `interval_s()` seconds, or after `retry_s` when it failed.

    Attributes:
        alone: only while the lease is held.
        drains: a clean stop waits for the round under way and does one more; others are cut off.
    """

    name: str
    round: Callable[[], Awaitable[object]]
    interval_s: Callable[[], float]
    alone: bool = True
    drains: bool = False
    retry_s: float = RETRY_S


class Supervisor:
    def __init__(self, lease: Lease, stopping: asyncio.Event) -> None:
        self._lease = lease
        self._stopping = stopping

    async def run(self, tasks: Sequence[Task]) -> None:
        """Runs all tasks until the stop, and the draining ones once more.

        Raises:
            ConfigError: of any task; the others are cut off.
        """
        running = [asyncio.create_task(self._repeat(task), name=task.name) for task in tasks]
        try:
            await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _repeat(self, task: Task) -> None:
        while not self._stopping.is_set():
            if task.alone and not self._lease.held:
                await self._unless_stopping(self._lease.wait())
                continue
            work = attempt(task)
            done = await (work if task.drains else self._unless_stopping(work))
            with suppress(TimeoutError):
                async with asyncio.timeout(task.interval_s() if done else task.retry_s):
                    await self._stopping.wait()
        if task.drains and (self._lease.held or not task.alone):
            await attempt(task)

    async def _unless_stopping(self, step: Coroutine[Any, Any, bool | None]) -> bool | None:
        """The step's result; None when the stop came first and cut it off."""
        work = asyncio.create_task(step)
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            for one in (work, stop):
                one.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)


async def attempt(task: Task) -> bool:
    """One round; whether it was done.

    Raises:
        ConfigError: nothing can be counted with this configuration.
    """
    try:
        await task.round()
    except ConfigError:
        raise
    except StoreUnavailableError as error:
        # Redis keeps the truth; the lag metric shows that the ledger is behind.
        _log.warning(f"{task.name}_postponed", reason=str(error))
    except Exception:
        # A bug in one round must not end the process: the counts wait in Redis, the lag shows.
        _log.exception(f"{task.name}_failed")
    else:
        return True
    return False
