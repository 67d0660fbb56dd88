"""A child process with its output captured, that cannot outlive the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.wait import wait_until

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """Started on construction (from the main thread); a context manager that stops it.

    Args:
        argv: the command.
        env: added to this process's environment; a value of None removes the variable.
        cwd: the repository by default.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
    ) -> None:
        from cli.embedded import process

        merged = dict(os.environ)
        merged["PYTHONPATH"] = str(ROOT)
        merged["PYTHONUNBUFFERED"] = "1"
        for name, value in (env or {}).items():
            if value is None:
                merged.pop(name, None)
            else:
                merged[name] = value
        fd, name = tempfile.mkstemp(prefix="tallygate-test-", suffix=".log")
        os.close(fd)
        self.log = Path(name)
        self.argv = list(argv)
        self._kept: str | None = None
        self.popen = process.spawn(
            self.argv,
            death_signal=signal.SIGTERM,
            log=self.log,
            env=merged,
            cwd=cwd or ROOT,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        """Everything printed so far, stdout and stderr together; still there after the end."""
        return self._kept if self._kept is not None else self.log.read_text(errors="replace")

    def wait_for_output(self, text: str, deadline_s: float = 20.0) -> str:
        """Poll until `text` was printed; returns the whole output. Fails at once if it ended."""

        def printed() -> bool:
            ended = self.popen.poll() is not None
            return text in self.output or ended

        try:
            wait_until(printed, deadline_s)
        except AssertionError:
            raise AssertionError(f"{text!r} not in the output:\n{self.output}") from None
        assert text in self.output, f"ended without printing {text!r}:\n{self.output}"
        return self.output

    def wait_for_http(self, url: str, deadline_s: float = 20.0) -> None:
        """Poll until `url` answers 200. Fails with the output when it ended or never does."""
        import httpx

        def answers() -> bool:
            if self.popen.poll() is not None:
                return True
            # plain HTTP: loading the machine's certificates costs more than a whole poll
            answer = httpx.get(url, timeout=2, verify=False, trust_env=False)
            return answer.status_code == 200

        try:
            wait_until(answers, deadline_s)
        except AssertionError:
            raise AssertionError(f"{url} never answered 200; output:\n{self.output}") from None
        assert self.popen.poll() is None, f"ended before it was ready:\n{self.output}"

    def wait(self, deadline_s: float = 30.0) -> int:
        """Exit status, negative signal number when a signal ended it."""
        try:
            return self.popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s} s:\n{self.output}") from None

    def terminate(self, deadline_s: float = 30.0) -> int:
        """SIGTERM and wait: the clean way out."""
        self.signal(signal.SIGTERM)
        return self.wait(deadline_s)

    def kill(self) -> int:
        """SIGKILL and wait."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def signal(self, signum: int) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signum)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from cli.embedded import process

        process.stop(self.popen, signal.SIGTERM, 15)
        self._kept = self.output
        if error is not None:
            sys.stderr.write(f"--- output of {' '.join(self.argv)}\n{self.output}\n---\n")
        self.log.unlink(missing_ok=True)


def run_module(
    module: str, *args: str, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> Process:
    """`python -m module args…` from the repository; use as `with run_module("gateway", …) as p:`"""
    return Process([sys.executable, "-m", module, *args], env=env, cwd=cwd)
