"""The answer for each way in which an upstream can fail; docs/upstreams.md has the table."""

from __future__ import annotations

from math import ceil
from typing import Final

from core.policy import Upstream
from gateway.answers import problems
from gateway.answers.problems import Problem
from gateway.proxy.errors import (
    BreakerOpen,
    ConnectTimeout,
    IdleTimeout,
    PoolExhausted,
    ProxyError,
    TotalTimeout,
)

# It waited for a connection already, or so many others do.
_BUSY_RETRY_S: Final = 1


def upstream_problem(error: ProxyError, upstream: Upstream, *, request_id: str) -> Problem:
    """502, 503 or 504 with the error's `code`."""
    code = error.code
    if isinstance(error, BreakerOpen):
        wait = ceil(error.retry_after_s)
        return problems.upstream_unavailable(wait, request_id=request_id, code=code)
    if isinstance(error, PoolExhausted):
        return problems.upstream_busy(_BUSY_RETRY_S, request_id=request_id, code=code)
    if error.status == 504:
        return problems.gateway_timeout(
            _allowed_ms(error, upstream), request_id=request_id, code=code
        )
    return problems.bad_gateway(request_id=request_id, code=code)


def _allowed_ms(error: ProxyError, upstream: Upstream) -> int:
    if isinstance(error, ConnectTimeout):
        return upstream.connect_timeout_ms
    if isinstance(error, TotalTimeout):
        return upstream.total_timeout_ms
    if isinstance(error, IdleTimeout):
        return upstream.idle_timeout_ms or upstream.response_timeout_ms
    per_try = upstream.retries.per_try_ms if upstream.retries is not None else 0
    return per_try or upstream.response_timeout_ms
