"""Encryption towards clients, and HTTP/2."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from core.config.base import Section
from core.config.fields import Address, Count, Flag, Listen, Size, empty_as_none, preset
from core.config.units import UnitError

# RFC 9113 section 6.9.2: what a client may send before it has read our settings.
LEAST_WINDOW = 65_535
MOST_STREAMS = 1_000

TLS_LISTEN = Address("127.0.0.1", 8443)

_SERVER_NAME = re.compile(r"^(\*\.)?[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")


def _server_name(value: object) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    if not _SERVER_NAME.fullmatch(text):
        raise UnitError(value, "not a host name; write api.example.com or *.example.com")
    return text


# YAML reads 1.2 as a number.
_Version = Annotated[
    Literal["1.2", "1.3"],
    BeforeValidator(str),
    WithJsonSchema({"enum": ["1.2", "1.3", 1.2, 1.3]}),
]
_ServerName = Annotated[str, BeforeValidator(_server_name), WithJsonSchema({"type": "string"})]


class CertificateSettings(Section):
    """A certificate and its key."""

    cert: str = Field(description="File in PEM form: the certificate, then those that signed it.")
    key: str = Field(description="File in PEM form: the private key, not encrypted.")
    names: tuple[_ServerName, ...] | None = Field(
        default=None,
        min_length=1,
        description="Host names (SNI) it is for; by default those in the certificate.",
    )


class TlsSettings(Section):
    """HTTPS. The files are read again when they change, and on SIGHUP."""

    listen: Listen = preset(TLS_LISTEN, "127.0.0.1:8443", None, "Address to listen on, host:port.")
    cert: Annotated[str | None, BeforeValidator(empty_as_none)] = Field(
        default=None,
        description="File in PEM form: the certificate, then those that signed it.",
    )
    key: Annotated[str | None, BeforeValidator(empty_as_none)] = Field(
        default=None, description="File in PEM form: the private key, not encrypted."
    )
    certificates: tuple[CertificateSettings, ...] = Field(
        default=(),
        description="Further ones, chosen by the host name a client asks for; the first of all is "
        "for names that none has.",
    )
    min_version: _Version = Field(default="1.2", description="Oldest version of TLS: 1.2 or 1.3.")
    client_ca: Annotated[str | None, BeforeValidator(empty_as_none)] = Field(
        default=None,
        description="Authorities of clients' certificates, PEM; each client then needs one.",
    )
    alpn: tuple[Literal["h2", "http/1.1"], ...] = Field(
        default=("h2", "http/1.1"),
        min_length=1,
        description="Protocols offered, best first; without h2 there is no HTTP/2.",
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a certificate and its key belong together; name both cert and key")
        if not self.pairs:
            raise ValueError("no certificate; name the files cert and key")
        return self

    @property
    def pairs(self) -> tuple[CertificateSettings, ...]:
        """All certificates; the first one is for clients that ask for no name we have."""
        if self.cert is None or self.key is None:
            return self.certificates
        return (CertificateSettings(cert=self.cert, key=self.key), *self.certificates)


class Http2Settings(Section):
    """HTTP/2 towards clients."""

    h2c: Flag = preset(
        False, False, None, "true speaks it without TLS too, with clients that know beforehand."
    )
    max_streams: Annotated[Count, Field(le=MOST_STREAMS)] = preset(
        128, 128, None, "Requests at once on one connection."
    )
    stream_window: Size = preset(
        256 * 2**10, "256 KiB", None, "Of one request's body, what may arrive before it is read."
    )
    connection_window: Size = preset(
        2**20, "1 MiB", None, "And of all bodies on one connection: the memory they take."
    )

    @field_validator("stream_window", "connection_window")
    @classmethod
    def _window(cls, size: int) -> int:
        if not LEAST_WINDOW <= size <= 2**31 - 1:
            raise ValueError("clients send 64 KiB unasked; write 64 KiB or more, 2 GiB at most")
        return size
