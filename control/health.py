"""What operators and load balancers ask: /healthz, /readyz, /metrics.

Liveness and readiness differ on purpose: restarting a process does not bring its database back, so
/healthz asks nobody, and only /readyz fails while a store is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core import clock
from core.errors import StoreUnavailableError
from core.telemetry import exposition

# Returns when the store answers.
# Raises StoreUnavailableError when it does not.
Check = Callable[[], Awaitable[None]]

# Shorter than a load balancer's usual 5 s, longer than a cold connection takes.
READY_TIMEOUT_S = 2.0

_NO_STORE = {"cache-control": "no-store"}


def routes(checks: Mapping[str, Check], metrics_directory: Path) -> list[Route]:
    """The three routes. `checks` by the name that /readyz shows."""

    async def healthz(_request: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def readyz(_request: Request) -> Response:
        reports = await asyncio.gather(*(_run(check) for check in checks.values()))
        ready = all(report["status"] == "ok" for report in reports)
        body = {
            "status": "ok" if ready else "unavailable",
            "checks": dict(zip(checks, reports, strict=True)),
        }
        return _json(200 if ready else 503, body)

    async def metrics(_request: Request) -> Response:
        page = await asyncio.to_thread(exposition.render, metrics_directory)
        return Response(page, 200, _NO_STORE, exposition.CONTENT_TYPE)

    return [
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
    ]


async def _run(check: Check) -> dict[str, object]:
    """`{"status": "ok"|"down", "seconds": ..., "error": ...}`; the error names no host or URL."""
    started = clock.monotonic()
    error = ""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await check()
    except TimeoutError:
        error = f"no answer within {READY_TIMEOUT_S:g} s"
    except StoreUnavailableError:
        error = "does not answer"
    report: dict[str, object] = {
        "status": "down" if error else "ok",
        "seconds": round(clock.monotonic() - started, 6),
    }
    if error:
        report["error"] = error
    return report


def _json(status: int, body: object) -> Response:
    return Response(orjson.dumps(body), status, _NO_STORE, "application/json")
