"""What goes wrong on the client's side while a request is answered.

`status` is the HTTP status to answer with, `code` a stable machine-readable word, `str(error)` a
sentence without secrets.
"""

from __future__ import annotations

from typing import ClassVar

from core.errors import TallygateError


class ExchangeError(TallygateError):
    """Base of all that ends an exchange early, on either side."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "exchange-error"


class BadRequest(ExchangeError):
    """The request cannot be understood or forwarded safely, whatever the upstream."""

    status = 400
    code = "bad-request"


class RequestTimeout(ExchangeError):
    """The client stopped sending its request body."""

    status = 408
    code = "request-timeout"


class PayloadTooLarge(ExchangeError):
    """The request body is larger than its route allows."""

    status = 413
    code = "content-too-large"


class ClientDisconnected(ExchangeError):
    """The client is gone: no answer can be delivered, only counted."""

    status = 499
    code = "client-disconnected"
