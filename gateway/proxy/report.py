"""What happens to upstreams, told to those on call: one log line a transition, and metrics.

The label `target` is a URL of the configuration, so a name with many addresses stays one series;
the log line has the address.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from core.telemetry import logs
from core.telemetry.metrics import Metrics
from gateway.proxy.breaker import State
from gateway.proxy.target import Endpoint

if TYPE_CHECKING:
    from gateway.proxy.pool import UpstreamPool

_log = logs.get_logger()

_STATES: Final = {State.CLOSED: "closed", State.HALF_OPEN: "half_open", State.OPEN: "open"}


class Report:
    """Of one upstream in one worker. Without metrics it only logs."""

    def __init__(self, upstream: str, metrics: Metrics | None = None) -> None:
        self._upstream = upstream
        self._metrics = metrics
        self._down: Counter[str] = Counter()

    # Targets

    def down(self, endpoint: Endpoint) -> None:
        self._count_down(endpoint.url, 1)

    def up(self, endpoint: Endpoint) -> None:
        self._count_down(endpoint.url, -1)

    def unhealthy(self, endpoint: Endpoint, why: str) -> None:
        self._say("warning", "upstream_target_unhealthy", endpoint, reason=why)

    def healthy(self, endpoint: Endpoint) -> None:
        self._say("info", "upstream_target_healthy", endpoint)

    def ejected(self, endpoint: Endpoint, seconds: float, why: str) -> None:
        self._say(
            "warning", "upstream_target_ejected", endpoint, seconds=seconds, reason=why,
            ejections=endpoint.ejections,
        )  # fmt: skip
        if self._metrics is not None:
            self._metrics.upstream_ejections.labels(self._upstream, endpoint.url).inc()

    def recovered(self, endpoint: Endpoint) -> None:
        self._say("info", "upstream_target_recovered", endpoint)

    def panic(self, on: bool) -> None:
        """No target is usable, so that all are tried; or at least one is again."""
        if on:
            _log.error("upstream_all_targets_down", upstream=self._upstream)
        else:
            _log.info("upstream_targets_back", upstream=self._upstream)

    def checked(self, ok: bool) -> None:
        if self._metrics is not None:
            result = "ok" if ok else "failed"
            self._metrics.upstream_checks.labels(self._upstream, result).inc()

    # The upstream

    def breaker(self, state: State) -> None:
        log = _log.warning if state is State.OPEN else _log.info
        log(f"upstream_breaker_{_STATES[state]}", upstream=self._upstream)
        if self._metrics is not None:
            self._metrics.upstream_breaker_state.labels(self._upstream).set(state)
            changes = self._metrics.upstream_breaker_changes
            changes.labels(self._upstream, _STATES[state]).inc()

    def retry(self, cause: str) -> None:
        if self._metrics is not None:
            self._metrics.upstream_retries.labels(self._upstream, cause).inc()

    def addresses(self, url: str, found: tuple[str, ...]) -> None:
        _log.info("upstream_addresses", upstream=self._upstream, target=url, addresses=list(found))

    def dns_failed(self, url: str, why: str) -> None:
        _log.warning("upstream_dns_failed", upstream=self._upstream, target=url, reason=why)
        if self._metrics is not None:
            self._metrics.upstream_dns_failures.labels(self._upstream).inc()

    def dns_mended(self, url: str) -> None:
        _log.info("upstream_dns_mended", upstream=self._upstream, target=url)

    def unverified(self) -> None:
        _log.warning(
            "upstream_tls_unverified",
            upstream=self._upstream,
            fix="take out tls.verify: false, and name the authority as tls.ca",
        )

    def sample(self, pool: UpstreamPool) -> None:
        """Copies the pool's counts into the gauges; twice a second, not for each request."""
        if self._metrics is None:
            return
        connections = self._metrics.upstream_connections
        connections.labels(self._upstream, "in_use").set(pool.in_use)
        connections.labels(self._upstream, "idle").set(pool.idle)
        self._metrics.upstream_waiting.labels(self._upstream).set(pool.waiting)

    def close(self) -> None:
        """The pool is gone: nothing of it may stay in the gauges."""
        for url in tuple(self._down):
            self._count_down(url, -self._down[url])
        if self._metrics is not None:
            self._metrics.upstream_breaker_state.labels(self._upstream).set(0)
            for kind in ("in_use", "idle"):
                self._metrics.upstream_connections.labels(self._upstream, kind).set(0)
            self._metrics.upstream_waiting.labels(self._upstream).set(0)

    def _count_down(self, url: str, change: int) -> None:
        self._down[url] += change
        if self._metrics is not None:
            down = self._metrics.upstream_targets_down
            down.labels(self._upstream, url).set(self._down[url])

    def _say(self, level: str, event: str, endpoint: Endpoint, **fields: object) -> None:
        getattr(_log, level)(
            event,
            upstream=self._upstream,
            target=endpoint.url,
            address=endpoint.target.label,
            **fields,
        )
