"""Processes of a benchmark: pinned to a core, ended with it, and what they have used so far."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

_TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")
_READY_S = 30.0
_STOP_S = 15.0


def pinned(cores: str | int, command: list[str]) -> list[str]:
    """The command on these cores ("0", "0,1", "2-3"), where there are several and `taskset`."""
    if (os.cpu_count() or 1) < 2 or shutil.which("taskset") is None:
        return command
    return ["taskset", "-c", str(cores), *command]


def pin(pid: int, cores: str | int) -> None:
    """Moves a running process, with all its threads, to these cores."""
    subprocess.run(["taskset", "-acp", str(cores), str(pid)], check=False, capture_output=True)


def start(
    stack: ExitStack,
    command: list[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
) -> subprocess.Popen[bytes]:
    """A process that is stopped when the stack is left; its output goes to `log`."""
    output = stack.enter_context(log.open("wb")) if log else None
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_ready(url: str, headers: Mapping[str, str] | None = None, log: Path | None = None) -> None:
    """Until the URL answers anything but 502, 503 or 504.

    Raises:
        TimeoutError: it did not within 30 s; the message has the end of the log.
    """
    deadline = time.monotonic() + _READY_S
    request = urllib.request.Request(url, headers=dict(headers or {}))
    while True:
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except urllib.error.HTTPError as error:
            if error.code not in (502, 503, 504):
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:] if log else ""
            raise TimeoutError(f"{url} is not ready after {_READY_S:.0f} s\n{said}")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The direct children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


def cpu_us(pid: int) -> float:
    """CPU time of a process so far, user + system of all threads, in microseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_US


def total_cpu_us(pids: Iterable[int]) -> float:
    return sum(map(cpu_us, pids))


def rss_mib(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> str:
    """Processor and number of cores, for the heading of a result."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} cores"
