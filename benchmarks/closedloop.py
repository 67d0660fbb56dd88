"""The client of a closed loop: wrk where there is one, otherwise `benchmarks.client`.

It finds out what a server can do at most. wrk is a third of the CPU of the Python client, which
matters where both share a core with the upstream and Redis.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.peers import Target
from benchmarks.processes import pinned
from benchmarks.tools import MissingError, Tool, wrk

_SCRIPT = Path(__file__).with_name("wrk.lua")
_GRACE_S = 60


@cache
def client() -> Tool | None:
    """wrk; None when it is not to be had."""
    try:
        return wrk()
    except MissingError:
        return None


def closed_loop(target: Target, connections: int, seconds: int, cores: str) -> dict[str, float]:
    """One run: requests, seconds, refused (429 and other statuses above 399), errors (no answer),
    p50_us, p90_us, p99_us and p999_us."""
    tool = client()
    if tool is None:
        return _python(target, connections, seconds, cores)
    with tempfile.NamedTemporaryFile("w", prefix="bench-keys-") as keys:
        keys.write("".join(f"{key}\n" for key in target.keys))
        keys.flush()
        command = [str(tool.path), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s"]
        command += ["-s", str(_SCRIPT), f"http://127.0.0.1:{target.port}{target.path}"]
        output = _run(pinned(cores, [*command, "--", keys.name]), seconds, tool)
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def _python(target: Target, connections: int, seconds: float, cores: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.client", "--port", str(target.port)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    command += ["--path", target.path, "--keys", ",".join(target.keys)]
    found: dict[str, Any] = json.loads(_run(pinned(cores, command), seconds))
    statuses = found.pop("statuses")
    errors = statuses.pop("lost", 0)
    refused = sum(count for status, count in statuses.items() if int(status) > 399)
    return found | {"refused": refused, "errors": errors}


def _run(command: list[str], seconds: float, tool: Tool | None = None) -> str:
    return subprocess.run(
        command,
        env=tool.env if tool else None,
        check=True,
        capture_output=True,
        text=True,
        timeout=seconds + _GRACE_S,
    ).stdout
