"""Many short processes for little: one that has imported everything forks each of them.

    with Hands("tests.integration.outage.worker") as hands:
        killed = hands.run("replay", failpoints="replay.counted", redis=url, ...)
        results = hands.together([("ingest", {...}), ("ingest", {...})])

A function `replay(say, **arguments)` of the module runs in a process of its own, with failpoints of
its own; `say(value)` is one write of one line, so what is in `lines` was said before the end.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.support.processes import ROOT


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative signal number, and what it said."""

    status: int
    lines: list[Any]


class Hands:
    """A context manager; `module` has the functions."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hands", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def run(self, function: str, *, failpoints: str = "", **arguments: Any) -> Ended:
        """Calls a function in a process; returns when that has ended."""
        return self.together([(function, arguments)], failpoints=failpoints)[0]

    def together(
        self, calls: Sequence[tuple[str, Mapping[str, Any]]], *, failpoints: str = ""
    ) -> list[Ended]:
        """Calls functions at once, each in a process; returns when all have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"calls": calls, "failpoints": failpoints}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return [Ended(**ended) for ended in json.loads(line)]

    def __enter__(self) -> Hands:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


# --- the process that forks -----------------------------------------------------------------------


def _child(module: Any, function: str, arguments: Any, failpoints: str, gate: int, out: int) -> int:
    from core import failpoints as armed

    armed._armed.update(armed._parse(failpoints))
    os.dup2(2, 1)  # what is printed is no answer
    os.read(gate, 1)  # nobody begins before all are there
    try:
        getattr(module, function)(
            lambda value: os.write(out, json.dumps(value).encode() + b"\n"), **arguments
        )
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _together(module: Any, calls: Any, failpoints: str) -> list[dict[str, Any]]:
    gate_read, gate_write = os.pipe()
    children: list[tuple[int, int]] = []
    for function, arguments in calls:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            os.close(read)
            for _, other in children:
                os.close(other)
            os._exit(_child(module, function, arguments, failpoints, gate_read, write))
        os.close(write)
        children.append((pid, read))
    os.close(gate_read)
    os.close(gate_write)
    ended = []
    for pid, read in children:
        with open(read, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        _, status = os.waitpid(pid, 0)
        ended.append({"status": os.waitstatus_to_exitcode(status), "lines": lines})
    return ended


def _main() -> None:
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(_together(module, given["calls"], given["failpoints"])), flush=True)


if __name__ == "__main__":
    _main()
