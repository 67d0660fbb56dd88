"""RFC 9457 answers to errors, for every route of the control plane."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from core import ids
from core.telemetry import logs

_OWN_BASE = "urn:tallygate:problem:"
_KNOWN = {
    400: ("bad-request", "Bad request"),
    404: ("not-found", "Not found"),
    405: ("method-not-allowed", "Method not allowed"),
    500: ("internal-error", "Internal error"),
    503: ("unavailable", "Unavailable"),
}

_log = logs.get_logger()


def problem(
    status: int,
    detail: str,
    *,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    slug: str | None = None,
    title: str | None = None,
) -> Response:
    """A problem+json response; `slug` and `title` default to those of the status."""
    known_slug, known_title = _KNOWN.get(status, ("error", "Error"))
    body = {
        "type": _OWN_BASE + (slug or known_slug),
        "title": title or known_title,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }
    return Response(
        orjson.dumps(body),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/problem+json",
    )


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, and every HTTPException of a route."""
    assert isinstance(error, HTTPException)
    detail, headers = error.detail, dict(error.headers or {})
    if error.status_code == 404:
        detail = f"There is nothing at {request.url.path}."
    elif error.status_code == 405 and "Allow" in headers:
        # Starlette joins a set: its order changes with every start.
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        detail = f"{request.url.path} answers to {headers['Allow']} only."
    return problem(error.status_code, detail, request_id=ids.new("req"), headers=headers)


async def on_unexpected(request: Request, error: Exception) -> Response:
    """500; what happened is in the log under the same request id, and not in the answer."""
    request_id = ids.new("req")
    _log.error(
        "request_failed",
        request_id=request_id,
        method=request.method,
        path=request.url.path,
        exc_info=error,
    )
    return problem(
        500,
        "The request failed. Quote the request_id when reporting it.",
        request_id=request_id,
    )
