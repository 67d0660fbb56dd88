"""Log lines as an operator and a log collector read them."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from core.telemetry import logs

SECRET = "tg_live_Zx9q7PlmW3sVt"
ROOT = Path(__file__).parents[3]
Read = Callable[[], list[bytes]]


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts back what `configure` replaces in the interpreter."""
    output, hook, level = logs._output, sys.excepthook, logging.getLogger().level
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logs._StdlibHandler)]:
        root.removeHandler(handler)
    root.setLevel(level)
    logs._output, sys.excepthook = output, hook
    logs._configure_structlog(logging.CRITICAL)
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def start(tmp_path: Path, restored: None) -> Iterator[Callable[..., Read]]:
    """`start(level, fmt)` configures logging into a file and returns a reader of its lines."""
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)

    def run(level: str = "info", fmt: Any = "json") -> Read:
        logs.configure(level, fmt, "gateway", fd=fd)

        def read() -> list[bytes]:
            assert logs.drain()
            return (tmp_path / "log").read_bytes().splitlines()

        return read

    yield run
    assert logs._output.writer is not None
    logs._output.writer.close()
    os.close(fd)


def test_a_json_line_has_its_fields_in_order(start: Callable[..., Read]) -> None:
    read = start()
    structlog.contextvars.bind_contextvars(request_id="req_1")
    logs.get_logger(subject="cus_1").info("admitted", decision_id="dec_1", cost=3)
    [line] = read()
    event = orjson.loads(line)
    assert list(event) == [
        "timestamp", "level", "event", "process", "request_id", "decision_id", "subject", "cost",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["timestamp"])
    assert (event["level"], event["process"], event["cost"]) == ("info", "gateway", 3)


def test_levels_filter_and_a_second_configure_changes_them(start: Callable[..., Read]) -> None:
    log = logs.get_logger()
    read = start("warning")
    log.info("not seen")
    logging.getLogger("asyncpg").info("not seen")
    log.warning("seen 1")
    start("debug")
    log.debug("seen 2")
    assert [orjson.loads(line)["event"] for line in read()] == ["seen 1", "seen 2"]


def test_a_library_and_an_exception_go_through_the_same_redaction(
    start: Callable[..., Read],
) -> None:
    read = start()
    logging.getLogger("redis").error("connecting to %s", "redis://:hunter2@h/0")
    try:
        raise ValueError(f"key {SECRET}, password=hunter2")
    except ValueError:
        logs.get_logger().exception("failed")
        logging.getLogger("asyncio").exception("failed too")
    first, second, third = (orjson.loads(line) for line in read())
    assert first["event"] == "connecting to redis://[redacted]@h/0"
    assert first["logger"] == "redis"
    assert second["exception"] == third["exception"]
    assert "Traceback" in second["exception"]
    assert "ValueError: key tg_live_[redacted], password=[redacted]" in second["exception"]


def test_a_record_that_cannot_be_printed_is_reported_without_its_arguments(
    start: Callable[..., Read], capsys: pytest.CaptureFixture[str]
) -> None:
    read = start()
    record = logging.LogRecord("bad", logging.ERROR, "", 1, "%d", (SECRET,), None)
    logs._StdlibHandler().handle(record)  # pytest's own handler would raise
    [line] = read()
    assert orjson.loads(line)["event"] == "log_record_unprintable"
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_rejection_line_is_escaped_and_scrubbed(start: Callable[..., Read], fmt: str) -> None:
    read = start(fmt=fmt)
    hostile = f'a"b\n\x1b[2J{SECRET} Bearer abcdefgh1234'
    logs.rejection(429, "daily", "cus_1", "weather", "free", hostile, "dec_1")
    [line] = read()
    assert SECRET.encode() not in line
    assert b"abcdefgh1234" not in line
    assert b"\x1b[2J" not in line
    if fmt == "json":
        event = orjson.loads(line)
        assert (event["event"], event["status"], event["reason"]) == (
            "request_refused",
            429,
            "daily",
        )
        assert event["request_id"].startswith('a"b\n\x1b[2Jtg_live_[redacted]')
        assert event["decision_id"] == "dec_1"


def test_a_rejection_with_text_that_is_no_unicode_is_still_a_line(
    start: Callable[..., Read],
) -> None:
    read = start()
    logs.rejection(401, "invalid-key", "", "weather", "", "req\udcff")
    assert orjson.loads(read()[0])["reason"] == "invalid-key"


def test_rejections_are_silent_above_info(start: Callable[..., Read]) -> None:
    read = start("warning")
    logs.rejection(429, "daily", "s", "r", "p", "q")
    assert read() == []


def test_console_lines_are_for_people(start: Callable[..., Read]) -> None:
    read = start(fmt="console")
    logs.get_logger().warning("slow flush", seconds=1.5, reason="two words", path="/a\x1b]0;x\x07")
    [line] = read()
    text = re.sub(r"\x1b\[[0-9;]*m", "", line.decode())
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} warning  gateway: slow flush  seconds=1\.5 reason="two words" '
        r"path=/a\\x1b]0;x\\x07",
        text,
    )


@pytest.mark.parametrize(("level", "fmt"), [("loud", "json"), ("info", "xml")])
def test_unknown_settings_are_refused(level: str, fmt: Any) -> None:
    with pytest.raises(ValueError, match="use"):
        logs.configure(level, fmt, "gateway")


def test_an_uncaught_exception_is_a_redacted_line() -> None:
    code = (
        "from core.telemetry import logs\nlogs.configure('info', 'json', 'control')\n"
        f"raise RuntimeError('no route to redis://:hunter2@h with {SECRET}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 1
    event = orjson.loads(done.stderr)
    assert event["event"] == "uncaught_exception"
    assert "redis://[redacted]@h with tg_live_[redacted]" in event["exception"]
    assert b"hunter2" not in done.stderr


def test_before_configure_nothing_is_printed() -> None:
    code = f"from core.telemetry import logs\nlogs.get_logger().critical('{SECRET}')\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=20, check=True
    )
    assert done.stdout + done.stderr == b""
