"""The certificates a worker shows, replaced without a restart when their files change.

Polled like the configuration, for the same reasons. A pair that cannot be used changes nothing: the
one in force stays, and that is logged and counted.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable

from core import clock
from core.certificates import Certificate, CertificateError, Material, build, watched
from core.config.tls import TlsSettings
from core.errors import ConfigError
from core.telemetry import logs

_log = logs.get_logger()

# By file; None is one that is gone.
_Signature = tuple[tuple[int, int, int] | None, ...]
_INTERVAL_S = 0.5
_SOON_S = 14 * 86_400


class Certificates:
    """Where the gateway's listener takes its context from: `context`.

    `on_reload(result)` is told "applied" or "refused"; `on_expiry(file, seconds)` when each
    certificate ends, in seconds since 1970.
    """

    def __init__(
        self,
        settings: TlsSettings,
        *,
        on_reload: Callable[[str], object],
        on_expiry: Callable[[str, float], object],
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """Raises:
        ConfigError: a file cannot be used.
        """
        self._settings = settings
        self._on_reload = on_reload
        self._on_expiry = on_expiry
        self._interval_s = interval_s
        self._certificates: tuple[Certificate, ...] = ()
        self._done = _signature(settings)
        try:
            self._take(build(settings))
        except CertificateError as error:
            raise ConfigError("gateway.tls", [str(error)]) from None

    @property
    def context(self) -> ssl.SSLContext:
        """For the next handshake."""
        return self._context

    def prepare(self, settings: TlsSettings) -> Callable[[], None]:
        """Reads the files of a new configuration; the result puts them in force.

        Where the same files are configured as before, those that cannot be used are left alone, so
        that a bad certificate does not stand in the way of a new limit.

        Raises:
            ConfigError: a file that is newly configured cannot be used.
        """
        signature = _signature(settings)
        try:
            material = build(settings)
        except CertificateError as error:
            if settings != self._settings:
                raise ConfigError("gateway.tls", [str(error)]) from None
            self._refuse(error)
            return lambda: None

        def switch() -> None:
            self._settings, self._done = settings, signature
            self._take(material)
            self._on_reload("applied")

        return switch

    async def run(self) -> None:
        """Poll until cancelled. As with the configuration, a change is taken once it is the same
        for two polls in a row: of two files that are replaced, the second may be on its way.
        """
        pending = self._done
        while True:
            await asyncio.sleep(self._interval_s)
            settings = self._settings
            seen = await asyncio.to_thread(_signature, settings)
            if seen == self._done or seen != pending:
                pending = seen
            else:
                try:
                    material = await asyncio.to_thread(build, settings)
                except CertificateError as error:
                    if settings is self._settings:
                        self._done = seen
                        self._refuse(error)
                    continue
                if settings is self._settings:  # else a reload was faster
                    self._done = seen
                    self._take(material)
                    self._on_reload("applied")

    def _refuse(self, error: CertificateError) -> None:
        self._on_reload("refused")
        _log.error("certificate_refused", reason=str(error), fix="the one before stays in force")

    def _take(self, material: Material) -> None:
        files = {certificate.file for certificate in material.certificates}
        for certificate in self._certificates:
            if certificate.file not in files:
                self._on_expiry(certificate.file, float("inf"))  # what is not shown never ends
        self._context = material.context
        self._certificates = material.certificates
        now = clock.now_ms() / 1000
        for certificate in material.certificates:
            ends = certificate.not_after.timestamp()
            self._on_expiry(certificate.file, ends)
            log = _log.warning if ends < now + _SOON_S else _log.info
            if certificate.not_before.timestamp() > now:
                log = _log.warning
            log(
                "certificate_in_force",
                file=certificate.file,
                serial=certificate.serial,
                names=certificate.names,
                not_before=certificate.not_before.isoformat(),
                not_after=certificate.not_after.isoformat(),
                expired=ends < now,
            )


def _signature(settings: TlsSettings) -> _Signature:
    found: list[tuple[int, int, int] | None] = []
    for file in watched(settings):
        try:
            stat = os.stat(file)
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)
