"""Log lines: one JSON object a line in production, coloured text on a terminal.

Every line, whoever wrote it (structlog, a library's stdlib logger, an uncaught exception), passes
`redaction.redact` and `redaction.scrub` and leaves through one `LineWriter`. Fields come in a fixed
order: timestamp (RFC 3339, UTC, milliseconds), level, event, process, request_id, decision_id, then
the rest. `rejection` is the hot path's own function: it builds the same line without structlog.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, Literal

import orjson
import structlog

from core import clock
from core.telemetry.redaction import redact, scrub
from core.telemetry.writer import LineWriter

Format = Literal["auto", "console", "json"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_FIRST_FIELDS = ("level", "event", "process", "request_id", "decision_id")
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
# C0 controls but tab and newline: a client's header must not drive the operator's terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(9), *range(11, 32), 127]}

# For Granian's `log_dictconfig`: it would otherwise print to stdout past redaction and writer.
GRANIAN_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {},
    "handlers": {},
    "loggers": {
        "_granian": {"handlers": [], "level": "INFO", "propagate": True},
        "granian.access": {"handlers": [], "level": "INFO", "propagate": True},
    },
}


class _Output:
    """Where lines go and how they look; replaced as a whole by `configure`."""

    def __init__(self, writer: LineWriter | None, json: bool, level: int, process: str) -> None:
        self.writer = writer
        self.json = json
        self.level = level
        self.process = process


# Before `configure` nothing is written: an import that logs is not a reason to print.
_output = _Output(None, json=True, level=logging.CRITICAL + 1, process="")


def configure(level: str, fmt: Format, process: str, *, fd: int = 2) -> LineWriter:
    """Sends all logging of this process to `fd`; may be called again, e.g. by a reload.

    Args:
        level: debug, info, warning, error or critical.
        fmt: `auto` is console on a terminal and json elsewhere.
        process: the `process` field of each line: gateway, control, reconciler.
        fd: stderr by default, so that a command's own output stays clean.

    Raises:
        ValueError: an unknown level or format.
    """
    global _output
    if level not in _LEVELS:
        raise ValueError(f"log level {level!r}: use one of {', '.join(_LEVELS)}")
    if fmt not in ("auto", "console", "json"):
        raise ValueError(f"log format {fmt!r}: use auto, console or json")
    old = _output.writer
    if old is not None and old.fd == fd:
        writer = old
    else:
        writer = LineWriter(fd)
        if old is not None:
            old.close()
    json = fmt == "json" or (fmt == "auto" and not os.isatty(fd))
    _output = _Output(writer, json, _LEVELS[level], process)
    _configure_structlog(_LEVELS[level])
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _StdlibHandler)]:
        root.removeHandler(handler)
    root.addHandler(_StdlibHandler())
    root.setLevel(_LEVELS[level])
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread
    return writer


def get_logger(**fields: Any) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `fields`: `get_logger().info("flushed", subjects=12)`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**fields)
    return logger


def take_dropped() -> int:
    """Lines dropped since the last call because the reader stalled or went away."""
    return _output.writer.take_dropped() if _output.writer is not None else 0


def drain(timeout_s: float = 1.0) -> bool:
    """Writes what is queued; False when the reader stalls for longer than `timeout_s`."""
    return _output.writer is None or _output.writer.drain(timeout_s)


def rejection(
    status: int,
    reason: str,
    subject: str,
    route: str,
    plan: str,
    request_id: str,
    decision_id: str = "",
) -> None:
    """One `request_refused` line at level info, cheap enough for a flood.

    `reason` is a limit's name on a 429, otherwise the slug of the problem. Strings from the client
    (a request id may be one) are escaped and scrubbed like everything else.
    """
    output = _output
    if output.level > logging.INFO or output.writer is None:
        return
    if not output.json:
        get_logger().info(
            "request_refused",
            status=status,
            reason=reason,
            subject=subject,
            route=route,
            plan=plan,
            request_id=request_id,
            decision_id=decision_id,
        )
        return
    event = {
        "timestamp": _timestamp(),
        "level": "info",
        "event": "request_refused",
        "process": output.process,
        "request_id": request_id,
        "decision_id": decision_id,
        "status": status,
        "reason": reason,
        "subject": subject,
        "route": route,
        "plan": plan,
    }
    try:
        line = orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # a lone surrogate in what the client sent
        line = orjson.dumps(redact(event), option=orjson.OPT_APPEND_NEWLINE)
    output.writer.write(scrub(line))


_second = -1
_second_text = ""


def _timestamp() -> str:
    """Now as RFC 3339; the part before the milliseconds is formatted once a second."""
    global _second, _second_text
    seconds, millis = divmod(clock.now_ms(), 1000)
    if seconds != _second:
        _second_text = clock.isoformat(seconds * 1000)[:20]
        _second = seconds
    return f"{_second_text}{millis:03d}Z"


def _configure_structlog(level: int) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            _emit,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.ReturnLoggerFactory(),
        # Not cached: loggers made at import must follow a reload that changes the level.
        cache_logger_on_first_use=False,
    )


def _emit(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """The last structlog processor: writes the line, hands an empty string to the logger."""
    error = event.pop("exc_info", None)
    if error:
        event["exception"] = _format_exception(error)
    _write(dict(event))
    return ""


def _write(event: dict[str, Any]) -> None:
    output = _output
    if output.writer is None:
        return
    event.setdefault("process", output.process)
    ordered = {name: event.pop(name) for name in _FIRST_FIELDS if name in event}
    ordered.update(event)
    clean: dict[str, Any] = {"timestamp": _timestamp()} | redact(ordered)
    line = _render_json(clean) if output.json else _render_console(clean)
    output.writer.write(scrub(line) + b"\n")


def _render_json(event: dict[str, Any]) -> bytes:
    return orjson.dumps(event, option=orjson.OPT_NON_STR_KEYS)


def _render_console(event: dict[str, Any]) -> bytes:
    exception = str(event.pop("exception", ""))
    stamp = str(event.pop("timestamp"))[11:23]
    level = str(event.pop("level", "info"))
    process = event.pop("process", "")
    message = str(event.pop("event", "")).translate(_CONTROLS).replace("\n", "\\n")
    colour = _COLOURS.get(level, "0")
    fields = " ".join(
        f"{name}={_console_value(value)}" for name, value in event.items() if value != ""
    ).translate(_CONTROLS)
    text = f"{stamp} \x1b[{colour}m{level:<8}\x1b[0m {process}: {message}  {fields}".rstrip()
    if exception:
        text += "\n" + exception.translate(_CONTROLS).rstrip()
    return text.encode("utf-8", "backslashreplace")


def _console_value(value: Any) -> str:
    if isinstance(value, str) and value and not any(c in value for c in ' "\n='):
        return value
    return orjson.dumps(value).decode()


def _format_exception(error: Any) -> str:
    if isinstance(error, BaseException):
        return "".join(traceback.format_exception(error))
    if isinstance(error, tuple) and isinstance(error[1], BaseException):
        return "".join(traceback.format_exception(error[1]))
    current = sys.exc_info()[1]
    return "".join(traceback.format_exception(current)) if current is not None else ""


class _StdlibHandler(logging.Handler):
    """Libraries' loggers (granian, asyncio, redis, asyncpg) into the same pipeline."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event: dict[str, Any] = {
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                "logger": record.name,
            }
            if record.exc_info:
                event["exception"] = _format_exception(record.exc_info)
            _write(event)
        except Exception:  # logging must not fail the code that logs; nor print its arguments raw
            _write({"level": "error", "event": "log_record_unprintable", "logger": record.name})


def _uncaught(
    kind: type[BaseException], error: BaseException, _traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    _write(
        {"level": "critical", "event": "uncaught_exception", "exception": _format_exception(error)}
    )
    drain()


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


# structlog's own default prints to stdout, past everything above.
_configure_structlog(logging.CRITICAL)
