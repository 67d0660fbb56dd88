"""A worker that spools, in a process of its own: `python -m tests.integration.outage.spooler`.

Arguments, JSON: mode, directory, and what the mode takes. Prints a line for each acknowledged
record, `id sequence payload`, with one write each, so that what is printed was acknowledged.

  append   records of `size` bytes from `writers` at once, every third by `append_written`,
           until it is killed, `times` are written, or `refusals` were refused
  replay   adopts and prints everything, and then marks it as done, in batches of `count`
  rounds   forks `rounds` appenders one after the other, kills each after a random number of
           acknowledged records, prints them; nothing is imported twice, so a round is short
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sys
from typing import Any

from gateway.outage.commit import SpoolUnavailable
from gateway.outage.spool import Spool

MAX_BYTES = 16 << 20


def say(line: str, fd: int = 1) -> None:
    os.write(fd, line.encode() + b"\n")


async def append(given: dict[str, Any], fd: int = 1) -> None:
    spool = Spool(given["directory"], given.get("max_bytes", MAX_BYTES), timeout_s=60)
    refused = 0
    written = 0

    async def writer(name: int) -> None:
        nonlocal refused, written
        at = 0
        while written < given.get("times", 1 << 30) and refused < given.get("refusals", 1):
            payload = f"{os.getpid()}-{name}-{at}-".ljust(given["size"], "x")
            at += 1
            try:
                if at % 3 == 0:
                    sequence = spool.append_written(payload.encode())
                    await asyncio.sleep(0)
                else:
                    sequence = await spool.append(payload.encode())
            except SpoolUnavailable:
                refused += 1
                say(f"refused {spool.state} {spool.pending_records}", fd)
                await asyncio.sleep(0)
            else:
                written += 1
                say(f"{sequence} {payload}", fd)

    await asyncio.gather(*(writer(name) for name in range(given["writers"])))
    await spool.close()


async def replay(given: dict[str, Any]) -> None:
    spool = Spool(given["directory"], MAX_BYTES, timeout_s=60)
    while await spool.adopt():
        while (batch := await spool.next_batch(given["count"])) is not None:
            for sequence, payload in batch.records:
                say(f"{batch.spool_id} {sequence} {payload.decode()}")
            await spool.done(batch)
    await spool.close()


def rounds(given: dict[str, Any]) -> None:
    pick = random.Random(given["seed"])
    for _ in range(given["rounds"]):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            asyncio.run(append(given, write))
            os._exit(0)
        os.close(write)
        wanted = pick.choice([1, 2, 5, 20, 60]) * 40
        seen = b""
        while len(seen) < wanted and (block := os.read(read, 512)):
            seen += block
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while block := os.read(read, 65_536):
            seen += block
        os.close(read)
        for line in seen.decode().splitlines():
            say(f"{child} {line}")


def main(given: dict[str, Any]) -> None:
    if "file_size" in given:
        resource.setrlimit(resource.RLIMIT_FSIZE, (given["file_size"], given["file_size"]))
    if given["mode"] == "rounds":
        rounds(given)
    elif given["mode"] == "replay":
        asyncio.run(replay(given))
    else:
        asyncio.run(append(given))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
