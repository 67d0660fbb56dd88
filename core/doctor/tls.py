"""Certificates towards clients: can they be used, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from core import clock
from core.certificates import Certificate, CertificateError, build
from core.config import Snapshot
from core.doctor.findings import Finding, Severity, ok

# Renewed by a tool, a certificate of 90 days is replaced 30 days before it ends.
SOON_DAYS = 14


def examine(snapshot: Snapshot) -> Iterator[Finding]:
    """Findings about `gateway.tls`, on the machine this runs on; none without it."""
    settings = snapshot.settings.gateway.tls
    if settings is None:
        return
    try:
        material = build(settings)
    except CertificateError as error:
        yield Finding(
            "config.tls",
            Severity.CRITICAL,
            f"gateway.tls: {error}; a gateway that starts now ends at once, one that runs keeps "
            "the certificates it has",
            {},
            "mend the file, readable by the user the gateway runs as",
        )
        return
    now = datetime.fromtimestamp(clock.now_ms() / 1000, UTC)
    for certificate in material.certificates:
        yield _one(certificate, now)


def _one(certificate: Certificate, now: datetime) -> Finding:
    check = "config.tls"
    days = (certificate.not_after - now).days
    names = ", ".join(certificate.names) or "no host name"
    shown = f"gateway.tls: {certificate.file} ({names})"
    if certificate.not_after <= now:
        return Finding(
            check, Severity.CRITICAL, f"{shown} has expired: clients refuse it", {}, "renew it"
        )
    if certificate.not_before > now:
        begins = certificate.not_before.isoformat()
        return Finding(
            check,
            Severity.CRITICAL,
            f"{shown} is not valid before {begins}: clients refuse it",
            {},
            "set this machine's clock, or use the certificate before",
        )
    if days < SOON_DAYS:
        return Finding(
            check,
            Severity.WARNING,
            f"{shown} expires in {days} days",
            {},
            "renew it; the gateway reads the files again by itself",
        )
    return ok(check, f"{shown} is valid for {days} days")
