"""Certificates for tests: an authority, and pairs in files as operators have them."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import trustme


class Files:
    """Pairs of an authority, written where the configuration says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)

    def pair(self, name: str, *names: str, not_after: datetime | None = None) -> dict[str, str]:
        """`cert` and `key` of a new certificate, in files that this name had before, if any."""
        made = self.ca.issue_cert(*(names or ("localhost", "127.0.0.1")), not_after=not_after)
        pair = {"cert": str(self.folder / f"{name}.crt"), "key": str(self.folder / f"{name}.key")}
        for file, blobs in (
            (pair["key"], [made.private_key_pem]),
            (pair["cert"], made.cert_chain_pems),
        ):
            draft = Path(file + ".new")
            draft.write_bytes(b"".join(blob.bytes() for blob in blobs))
            draft.replace(file)
        return pair

    def expired(self, name: str) -> dict[str, str]:
        return self.pair(name, not_after=datetime(2020, 1, 1, tzinfo=UTC))

    def trusting(self, *alpn: str) -> ssl.SSLContext:
        """A client's context."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        context.set_alpn_protocols(list(alpn or ("h2", "http/1.1")))
        return context
