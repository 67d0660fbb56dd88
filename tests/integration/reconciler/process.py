"""A whole reconciler in a process that tests.support.hands forks: until nothing is left to do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.config import load
from core.keyspace import Keyspace
from core.redis.store import Store
from reconciler.worker import Reconciler


def reconcile(say: Callable[[Any], object], config: str, env: dict[str, str]) -> None:
    """Runs until everything is flushed and stored, and what is due has expired."""
    os.environ.update(env)
    keys = Keyspace()

    async def drained(store: Store) -> bool:
        counts = [
            await store.cardinality(keys.dirty(0)),
            await store.length(keys.events(0)),
            await store.length(keys.ingested(0)),
            len(await store.up_to(keys.due(0), await store.now_ms(), 1)),
        ]
        return not any(counts)

    async def main() -> None:
        store = Store.connect(env["TALLYGATE_REDIS_URL"], 5.0)
        reconciler = Reconciler(Path(config), load(Path(config)))
        running = asyncio.create_task(reconciler.run())
        while not (await drained(store) and await drained(store)):
            await asyncio.sleep(0.02)
            assert not running.done()
        reconciler.stop()
        await running
        await store.close()
        say("drained")

    asyncio.run(main())
