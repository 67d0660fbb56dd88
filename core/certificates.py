"""Certificates for TLS towards clients: reading them, what they say, and the context they make."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from core.config.tls import CertificateSettings, TlsSettings
from core.errors import TallygateError

# Of TLS 1.2, what HTTP/2 allows (RFC 9113 appendix A): ephemeral keys and authenticated ciphers.
# Those of TLS 1.3 are all of that kind.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"

_VERSIONS: Final[Mapping[str, ssl.TLSVersion]] = {
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}


class CertificateError(TallygateError):
    """Files that cannot be used; the message names the file, what is wrong, and the fix."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says.

    Attributes:
        file: where it is, as configured.
        names: host names it is for; `*.example.com` stands for one label.
        not_before, not_after: when it is valid, in UTC.
        serial: its number, in hex.
    """

    file: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    serial: str


@dataclass(frozen=True, slots=True)
class Material:
    """A context for the next handshakes, and the certificates in it."""

    context: ssl.SSLContext
    certificates: tuple[Certificate, ...]


def read_pair(settings: CertificateSettings) -> Certificate:
    """A certificate and its key, checked as far as files can be.

    Raises:
        CertificateError: one cannot be read, is none, or they do not belong together.
    """
    # Imported here: who has no TLS does not load it.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificates(_read(settings.cert))[0]
    except (ValueError, IndexError):
        raise CertificateError(f"{settings.cert}: no certificate in PEM form") from None
    try:
        key = load_pem_private_key(_read(settings.key), None)
    except TypeError:
        raise CertificateError(
            f"{settings.key}: the key is encrypted; store it without a passphrase, readable by "
            "the gateway's user only"
        ) from None
    except Exception:  # one of several, by what is wrong with it
        raise CertificateError(f"{settings.key}: no private key in PEM form") from None
    if key.public_key() != certificate.public_key():
        raise CertificateError(
            f"{settings.key}: the key does not belong to the certificate in {settings.cert}"
        )
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        names = []
    return Certificate(
        settings.cert,
        tuple(name.lower() for name in settings.names or names),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        f"{certificate.serial_number:x}",
    )


def build(settings: TlsSettings) -> Material:
    """Reads all files of a configuration.

    Raises:
        CertificateError: one of them cannot be used.
    """
    certificates = tuple(read_pair(pair) for pair in settings.pairs)
    contexts = [_context(settings, pair) for pair in settings.pairs]
    if len(contexts) > 1:
        by_name: dict[str, ssl.SSLContext] = {}
        for certificate, context in zip(certificates, contexts, strict=True):
            for name in certificate.names:
                by_name.setdefault(name, context)

        def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            if name is not None:
                found = find(by_name, name.lower().removesuffix("."))
                if found is not None:
                    connection.context = found

        contexts[0].sni_callback = choose
    return Material(contexts[0], certificates)


def find(by_name: Mapping[str, ssl.SSLContext], name: str) -> ssl.SSLContext | None:
    """What is for this host name; a wildcard stands for the first label."""
    return by_name.get(name) or by_name.get("*." + name.partition(".")[2])


def watched(settings: TlsSettings) -> Sequence[str]:
    """The files whose change asks for a new context."""
    files = [file for pair in settings.pairs for file in (pair.cert, pair.key)]
    return [*files, settings.client_ca] if settings.client_ca is not None else files


def _context(settings: TlsSettings, pair: CertificateSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.min_version]
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(list(settings.alpn))
    try:
        # The key was found to be in the clear: a prompt would stop the process.
        context.load_cert_chain(pair.cert, pair.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise CertificateError(f"{pair.cert}: cannot be used with {pair.key}: {error}") from None
    if settings.client_ca is not None:
        try:
            context.load_verify_locations(cadata=_read(settings.client_ca).decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise CertificateError(f"{settings.client_ca}: no certificates in PEM form") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise CertificateError(f"{file}: cannot be read: {error.strerror or error}") from None
