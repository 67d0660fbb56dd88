"""TLS towards upstreams: one context from the files that the configuration names."""

from __future__ import annotations

import ssl

from core.errors import TallygateError
from core.upstream import UpstreamTls


class TlsFileError(TallygateError):
    """A file that is not what it should be: `field` (ca, cert or key) and the `reason`."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


def client_context(tls: UpstreamTls) -> ssl.SSLContext:
    """A context for connections to one upstream: TLS 1.2 or later, HTTP/1.1.

    Raises:
        TlsFileError: a file cannot be read, is no PEM, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.ca:
        try:
            context.load_verify_locations(tls.ca)
        except (ssl.SSLError, OSError) as error:
            raise TlsFileError("ca", f"no PEM file of certificates: {_why(error)}") from None
    elif tls.verify:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if tls.cert:
        try:
            # Never the terminal: a key with a passphrase would stop the process at a prompt.
            context.load_cert_chain(tls.cert, tls.key, password=_no_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsFileError("key", "not the key of the certificate in cert") from None
            raise TlsFileError(
                "cert", f"cert and key are no PEM files of a certificate and its key: {_why(error)}"
            ) from None
        except (OSError, ValueError) as error:
            raise TlsFileError("key", f"cannot be loaded: {_why(error)}") from None
    return context


def _no_passphrase() -> str:
    raise ValueError("it has a passphrase; store it without one")


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason).lower().replace("_", " ")
