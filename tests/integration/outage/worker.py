"""What a gateway worker does in and after an outage, without HTTP; run by tests.support.hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from core.policy import OutageMode, PeriodKind, Quota
from gateway.outage.spool import Spool
from tests.integration.admission.stack import admitted, stack
from tests.support.scripts import plan_of

Say = Callable[[Any], object]

MAX_BYTES = 1 << 20
QUOTA = 100
PLAN = plan_of(
    Quota("monthly", "requests", QUOTA, PeriodKind.BILLING),
    Quota("daily", "requests", QUOTA * 10, PeriodKind.DAY),
)


def serve(
    say: Say, redis: str, postgres: str, directory: str, subject: str, times: int, writers: int
) -> None:
    """Requests on an open route; each that may be served is said."""

    async def main() -> None:
        spool = Spool(directory, MAX_BYTES, timeout_s=60)
        async with stack(redis, postgres, PLAN, journal=spool) as parts:
            admission = parts.admission(PLAN, outage=OutageMode.OPEN)

            async def writer() -> None:
                for _ in range(times // writers):
                    for decision in await parts.hit(admission, subject, 1):
                        assert decision.admitted
                        say(1)

            await asyncio.gather(*(writer() for _ in range(writers)))
        await spool.close()

    asyncio.run(main())


def replay(say: Say, redis: str, postgres: str, directory: str) -> None:
    """Adopts what there is and replays it."""

    async def main() -> None:
        spool = Spool(directory, MAX_BYTES, timeout_s=60)
        async with stack(redis, postgres, PLAN, journal=spool) as parts:
            while await spool.adopt():
                while await parts.replay.once():
                    say("batch")
        await spool.close()

    asyncio.run(main())


def admit(say: Say, redis: str, postgres: str, subject: str, times: int) -> None:
    """Requests of one subscription with Redis there; each that was admitted is said."""

    async def main() -> None:
        async with stack(redis, postgres, PLAN) as parts:
            admission = parts.admission(PLAN)
            for _ in range(times):
                if admitted(await parts.hit(admission, subject, 1)):
                    say(1)

    asyncio.run(main())
