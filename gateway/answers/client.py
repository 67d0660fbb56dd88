"""Problems of which the client is the cause, once its request is being answered."""

from __future__ import annotations

from gateway.answers import problems
from gateway.answers.problems import Problem
from gateway.http.errors import BadRequest, PayloadTooLarge, RequestTimeout


def client_problem(
    error: BadRequest | RequestTimeout | PayloadTooLarge, max_body: int, *, request_id: str
) -> Problem:
    """400, 408 or 413; `max_body` is the route's, in bytes."""
    if isinstance(error, PayloadTooLarge):
        return problems.content_too_large(max_body, request_id=request_id)
    if isinstance(error, RequestTimeout):
        return problems.request_timeout(request_id=request_id)
    return problems.bad_request(str(error), request_id=request_id)
