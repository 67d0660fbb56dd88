"""What can go wrong between a request and its upstream; what its client does is in gateway.http.

Each class carries what a responder needs: `status` is the HTTP status to answer with, `code` a
stable machine-readable word, `str(error)` a sentence without secrets. They are raised only while
the response has not started; after that a relay returns a result whose outcome says so.
"""

from __future__ import annotations

from typing import ClassVar

from gateway.http.errors import ExchangeError


class ProxyError(ExchangeError):
    """Base of all failures of an upstream."""

    status: ClassVar[int] = 502
    code: ClassVar[str] = "proxy-error"


class ConnectError(ProxyError):
    """No target of the upstream accepted a connection."""

    code = "upstream-unreachable"


class ConnectTimeout(ProxyError):
    """A connection was not established within the upstream's connect time-out."""

    status = 504
    code = "upstream-connect-timeout"


class TlsFailed(ConnectError):
    """A target accepted the connection and then TLS failed: its certificate, or ours."""

    code = "upstream-tls"


class PoolExhausted(ProxyError):
    """All connections stayed busy for the whole connect time-out: the upstream is overloaded."""

    status = 503
    code = "upstream-busy"


class QueueFull(PoolExhausted):
    """So many requests wait for a connection that one more would not get its turn in time."""

    code = "upstream-queue-full"


class BreakerOpen(ProxyError):
    """The upstream failed too often and is given a rest; `retry_after_s` is how long."""

    status = 503
    code = "upstream-resting"

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ResponseTimeout(ProxyError):
    """The upstream did not begin its answer within its response time-out."""

    status = 504
    code = "upstream-timeout"


class IdleTimeout(ResponseTimeout):
    """The upstream stopped in the middle of its answer for longer than its idle time-out."""

    code = "upstream-idle-timeout"


class TotalTimeout(ResponseTimeout):
    """The whole took longer than the upstream's total time-out, retries included."""

    code = "upstream-total-timeout"


class BadUpstreamResponse(ProxyError):
    """The answer is not one HTTP/1.1 message with unambiguous framing."""

    code = "upstream-bad-response"


class UpstreamClosed(BadUpstreamResponse):
    """The connection ended before the answer was complete."""

    code = "upstream-closed"
