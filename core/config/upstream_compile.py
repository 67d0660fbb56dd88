"""From `upstreams` of the file to `core.upstream`: checks across fields, and files of TLS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path as File
from typing import Any

from core.config.compile import attempt, mapping
from core.config.document import Path
from core.config.problems import Problems
from core.config.upstreams import HashBalance, TlsSpec, UpstreamSpec, WeightedUrl
from core.tls import TlsFileError, client_context
from core.upstream import (
    Balance,
    Breaker,
    Ejection,
    HealthCheck,
    Retries,
    Upstream,
    UpstreamTls,
)


def compile_upstreams(data: Mapping[str, Any], problems: Problems) -> dict[str, Upstream]:
    """The sound upstreams, by name; findings about the others go to `problems`."""
    found = {}
    for name, raw in mapping(data, "upstreams").items():
        spec: UpstreamSpec | None = attempt(UpstreamSpec, raw)
        if spec is not None:
            found[name] = _upstream(("upstreams", name), name, spec, problems)
    return found


def statuses(words: Iterable[str]) -> frozenset[int]:
    """The codes that `200` and `2xx` mean."""
    codes: set[int] = set()
    for word in words:
        first = int(word.replace("x", "0"))
        codes.update(range(first, first + (100 if word.endswith("xx") else 1)))
    return frozenset(codes)


def _upstream(path: Path, name: str, spec: UpstreamSpec, problems: Problems) -> Upstream:
    weighted = [url if isinstance(url, WeightedUrl) else WeightedUrl(url=url) for url in spec.urls]
    urls = tuple(item.url for item in weighted)
    _check(path, urls, spec, problems)
    hashed = isinstance(spec.balance, HashBalance)
    return Upstream(
        name=name,
        urls=urls,
        weights=tuple(item.weight for item in weighted),
        balance=Balance.HASH if hashed else Balance(str(spec.balance)),
        hash_by=spec.balance.hash if isinstance(spec.balance, HashBalance) else "",
        connect_timeout_ms=spec.timeout.connect_ms,
        response_timeout_ms=spec.timeout.response_ms,
        idle_timeout_ms=spec.timeout.idle_ms or 0,
        total_timeout_ms=spec.timeout.total_ms or 0,
        max_connections=spec.pool.max_connections,
        keepalive_ms=spec.pool.keepalive_ms,
        lifetime_ms=spec.pool.lifetime_ms or 0,
        max_waiting=spec.pool.max_waiting,
        tls=_tls((*path, "tls"), urls, spec.tls or TlsSpec(), problems),
        health=_health(spec),
        eject=None
        if spec.eject is None
        else Ejection(spec.eject.failures, spec.eject.for_ms, spec.eject.max_ms),
        dns_refresh_ms=0 if spec.dns is None else spec.dns.refresh_ms,
        retries=_retries(spec),
        breaker=_breaker(spec),
    )


def _check(path: Path, urls: tuple[str, ...], spec: UpstreamSpec, problems: Problems) -> None:
    for index, url in enumerate(urls):
        if url in urls[:index]:
            problems.add((*path, "urls", index), "the same address twice; give one a weight")
    if spec.tls is not None and not any(_is_https(url) for url in urls):
        problems.add((*path, "tls"), "no URL is https; write https://, or remove this", value=False)
    eject, timeout, retries = spec.eject, spec.timeout, spec.retries
    if eject is not None and eject.max_ms < eject.for_ms:
        problems.add(
            (*path, "eject", "max"), f"shorter than for ({eject.for_ms} ms); make it longer"
        )
    if timeout.total_ms is not None and timeout.total_ms < timeout.response_ms:
        problems.add(
            (*path, "timeout", "total"),
            f"shorter than response ({timeout.response_ms} ms), which it would cut; "
            "shorten response too",
        )
    if retries is not None and (retries.per_try_ms or 0) > timeout.response_ms:
        problems.add(
            (*path, "retries", "per_try"),
            f"longer than timeout.response ({timeout.response_ms} ms); make it shorter",
        )
    health = spec.health
    if health is not None and health.timeout_ms > health.interval_ms:
        problems.add(
            (*path, "health", "timeout"),
            f"longer than interval ({health.interval_ms} ms); make it shorter",
        )


def _is_https(url: str) -> bool:
    return url[:6].lower() == "https:"


def _tls(path: Path, urls: tuple[str, ...], spec: TlsSpec, problems: Problems) -> UpstreamTls:
    """Reads the files, so that a wrong one is found now and not by a customer."""
    if (spec.cert is None) != (spec.key is None):
        missing, given = ("key", "cert") if spec.key is None else ("cert", "key")
        problems.add((*path, given), f"needs {missing} beside it; name both, or neither")
        return UpstreamTls()
    digest = hashlib.sha256()
    for field, name in (("ca", spec.ca), ("cert", spec.cert), ("key", spec.key)):
        if name is None:
            continue
        try:
            digest.update(File(name).read_bytes())
        except OSError as error:
            problems.add((*path, field), f"cannot be read: {error.strerror or error}")
            return UpstreamTls()
        digest.update(b"\0")
    files = spec.ca or spec.cert
    tls = UpstreamTls(
        verify=spec.verify,
        ca=spec.ca or "",
        cert=spec.cert or "",
        key=spec.key or "",
        server_name=spec.server_name or "",
        digest=digest.hexdigest() if files else "",
    )
    if files and any(_is_https(url) for url in urls):
        try:
            client_context(tls)
        except TlsFileError as error:
            problems.add((*path, error.field), error.reason)
    return tls


def _health(spec: UpstreamSpec) -> HealthCheck | None:
    health = spec.health
    if health is None:
        return None
    return HealthCheck(
        path=health.path,
        statuses=statuses(health.status),
        interval_ms=health.interval_ms,
        timeout_ms=health.timeout_ms,
        healthy_after=health.healthy_after,
        unhealthy_after=health.unhealthy_after,
    )


def _retries(spec: UpstreamSpec) -> Retries | None:
    retries = spec.retries
    if retries is None:
        return None
    return Retries(
        attempts=retries.attempts,
        percent=retries.budget.percent,
        floor=retries.budget.floor,
        per_try_ms=retries.per_try_ms or 0,
        backoff_ms=retries.backoff_ms,
        causes=frozenset(cause for cause in retries.on if isinstance(cause, str)),
        statuses=frozenset(cause for cause in retries.on if isinstance(cause, int)),
    )


def _breaker(spec: UpstreamSpec) -> Breaker | None:
    breaker = spec.breaker
    if breaker is None:
        return None
    return Breaker(
        errors=breaker.errors,
        window_ms=breaker.window_ms,
        minimum=breaker.minimum,
        open_ms=breaker.open_ms,
        probes=breaker.probes,
    )
