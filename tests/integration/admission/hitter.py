"""A gateway's admission in a process of its own: `python -m tests.integration.admission.hitter`.

Arguments, JSON: redis, postgres, subjects, times (requests of each subject), quota. Waits for a
line on standard input, so that several start together; prints the number admitted by subject.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from core.policy import PeriodKind, Quota
from tests.integration.admission.stack import admitted, stack
from tests.support.scripts import plan_of


async def main(given: dict[str, Any]) -> dict[str, int]:
    plan = plan_of(
        Quota("monthly", "requests", given["quota"], PeriodKind.BILLING),
        Quota("daily", "requests", given["quota"] * 10, PeriodKind.DAY),
    )
    async with stack(given["redis"], given["postgres"], plan) as parts:
        admission = parts.admission(plan)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        found = await asyncio.gather(
            *(parts.hit(admission, subject, given["times"]) for subject in given["subjects"])
        )
    return dict(zip(given["subjects"], map(admitted, found), strict=True))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.argv[1])))))
