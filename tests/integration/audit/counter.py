"""Counts without end in a process of its own: `python -m tests.integration.audit.counter`.

Arguments, JSON: redis, postgres, subjects. Until a line comes on standard input; prints the number
of requests admitted by subject.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

from tests.integration.admission.stack import stack
from tests.integration.audit.scene import PLAN


async def main(given: dict[str, Any]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    async with stack(given["redis"], given["postgres"], PLAN, timeout_s=30) as found:
        admission = found.admission(PLAN, {"requests": 1, "credits": 25})
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        print("ready", flush=True)
        while not ended.done():
            for subject in given["subjects"]:
                for decision in await found.hit(admission, subject, 3):
                    counted[subject] += decision.admitted
    return dict(counted)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.argv[1])))))
