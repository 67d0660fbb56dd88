"""The names of a request: ours for leases and decisions, and the one everybody quotes."""

from __future__ import annotations

from gateway.http.message import Request
from gateway.proxy.request import MAX_REQUEST_ID


def decision_id_of(own_id: str) -> str:
    """What support looks up in the log, from our id of the request."""
    return "dec_" + own_id.removeprefix("req_")


def sent_id(request: Request) -> str:
    """The client's X-Request-Id, if it is one that can be repeated; else empty."""
    for name, value in request.headers:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable():
                return text
    return ""
