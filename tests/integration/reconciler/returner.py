"""A gateway's admission in a process of its own, whose subjects pause between bursts.

`python -m tests.integration.reconciler.returner`: arguments, JSON: redis, postgres, subjects,
times (requests of each subject in a burst), rounds, quota. Each burst waits until its subject has
left Redis, or a while; prints the number admitted by subject.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from core.policy import PeriodKind, Quota
from tests.integration.admission.stack import admitted, stack
from tests.support.scripts import plan_of

_PAUSE_S = 3.0


async def main(given: dict[str, Any]) -> dict[str, int]:
    plan = plan_of(Quota("monthly", "requests", given["quota"], PeriodKind.BILLING))
    counted = dict.fromkeys(given["subjects"], 0)
    async with stack(given["redis"], given["postgres"], plan) as parts:
        admission = parts.admission(plan)

        async def bursts(subject: str) -> None:
            key = parts.keyspace.state(subject)
            for _ in range(given["rounds"]):
                counted[subject] += admitted(await parts.hit(admission, subject, given["times"]))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_S):
                        while (await parts.store.hgetall_many([key]))[0]:
                            await asyncio.sleep(0.001)

        await asyncio.gather(*map(bursts, given["subjects"]))
    return counted


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.argv[1])))))
