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


class PoolExhausted(ProxyError):
    """All connections stayed busy for the whole connect time-out: the upstream is overloaded."""

    status = 503
    code = "upstream-busy"


class ResponseTimeout(ProxyError):
    """The upstream made no progress for its response time-out."""

    status = 504
    code = "upstream-timeout"


class BadUpstreamResponse(ProxyError):
    """The answer is not one HTTP/1.1 message with unambiguous framing."""

    code = "upstream-bad-response"


class UpstreamClosed(BadUpstreamResponse):
    """The connection ended before the answer was complete."""

    code = "upstream-closed"
