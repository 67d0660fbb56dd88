"""The endpoints of one upstream: which there are, and which of them get requests.

They change by DNS (`resolve`), active checks (`health`) and passive ejection (`eject`), all of
which end in `_refresh`. If no endpoint is usable, all are live: trying what is probably down is
better than refusing everything.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection

from core.policy import Upstream
from core.tls import client_context
from gateway.proxy import balance
from gateway.proxy.connect import connect
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.eject import Ejector
from gateway.proxy.health import HealthChecks
from gateway.proxy.report import Report
from gateway.proxy.resolve import Resolution, Resolver, is_name
from gateway.proxy.target import Endpoint, Target, parse_target


class Endpoints:
    """Args:
    on_change: called when endpoints came or went.
    on_gone: called with each that went.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        resolver: Resolver,
        now: Callable[[], float],
        on_change: Callable[[], object],
        on_gone: Callable[[Endpoint], object],
    ) -> None:
        if not upstream.urls:
            raise ValueError(f"upstream {upstream.name!r} has no URL")
        self._upstream = upstream
        self._resolver = resolver
        self._on_change = on_change
        self._on_gone = on_gone
        self._report = Report(upstream.name)
        name = upstream.tls.server_name
        targets = [parse_target(url, name) for url in upstream.urls]
        self.context: ssl.SSLContext | None = None
        if any(target.server_name for target in targets):
            self.context = client_context(upstream.tls)
        weights = upstream.weights or (1,) * len(targets)
        self._of_url: list[list[Endpoint]] = [
            [Endpoint(url, target, weight)]
            for url, target, weight in zip(upstream.urls, targets, weights, strict=True)
        ]
        self._targets = targets
        self.all: tuple[Endpoint, ...] = ()
        self._down: set[Endpoint] = set()
        self._panicking = False
        self._balancer = balance.make(upstream)
        self._resolutions: list[Resolution] = []
        self._health: HealthChecks | None = None
        self.started = False
        self._closed = False
        self.ejector: Ejector | None = None
        if upstream.eject is not None:
            self.ejector = Ejector(
                upstream.eject,
                call_later=lambda seconds, call: asyncio.get_running_loop().call_later(
                    seconds, call
                ),
                ejected=self._ejected,
                returned=lambda endpoint: self._refresh(),
                recovered=self._recovered,
                panicking=lambda: self._panicking,
                now=now,
            )
        self._regroup()

    def start(self, report: Report) -> None:
        """Begin checks and look-ups, on the running loop."""
        self.started = True
        self._report = report
        upstream = self._upstream
        if self.context is not None and not upstream.tls.verify:
            report.unverified()
        if upstream.health is not None:
            self._health = HealthChecks(
                upstream.health, self._open_for_check, self._health_changed, report.checked
            )
            for endpoint in self.all:
                self._health.watch(endpoint)
        if upstream.dns_refresh_ms:
            for index, target in enumerate(self._targets):
                if is_name(target.host):
                    self._resolve(index, target)

    def close(self) -> None:
        self._closed = True
        for resolution in self._resolutions:
            resolution.close()
        if self._health is not None:
            self._health.close()
        if self.ejector is not None:
            self.ejector.close()

    def pick(self, key: bytes, avoid: Collection[Endpoint]) -> Endpoint:
        """The endpoint for a request."""
        every = self.all
        return every[0] if len(every) == 1 else self._balancer.pick(key, avoid)

    def other(self, tried: Collection[Endpoint]) -> Endpoint | None:
        """A live endpoint that was not tried; None if there is none."""
        if all(endpoint in tried for endpoint in self.all if endpoint.live):
            return None
        return self._balancer.pick(b"", tried)

    # DNS

    def _resolve(self, index: int, target: Target) -> None:
        url = self._upstream.urls[index]
        resolution = Resolution(
            target.host,
            target.port,
            self._upstream.dns_refresh_ms / 1000,
            self._resolver,
            found=lambda addresses: self._found(index, addresses),
            failed=lambda why: self._report.dns_failed(url, why),
            mended=lambda: self._report.dns_mended(url),
        )
        self._resolutions.append(resolution)
        resolution.start()

    def _found(self, index: int, addresses: tuple[str, ...]) -> None:
        """One endpoint for each address; those that stay keep their connections and their past."""
        url, target = self._upstream.urls[index], self._targets[index]
        known = {endpoint.target.host: endpoint for endpoint in self._of_url[index]}
        weight = self._of_url[index][0].weight
        self._of_url[index] = [
            known.pop(address)
            if address in known
            else Endpoint(url, target._replace(host=address), weight)
            for address in addresses
        ]
        self._report.addresses(url, addresses)
        before = set(self.all)
        self._regroup()
        self._on_change()
        for endpoint in self.all:
            if endpoint not in before and self._health is not None:
                self._health.watch(endpoint)
        for endpoint in known.values():
            self._leave(endpoint)

    def _leave(self, endpoint: Endpoint) -> None:
        if self._health is not None:
            self._health.forget(endpoint)
        if self.ejector is not None:
            self.ejector.forget(endpoint)
        self._on_gone(endpoint)

    # Up and down

    async def _open_for_check(self, endpoint: Endpoint) -> UpstreamConnection:
        return await connect(endpoint, self.context, lambda conn: None)

    def _health_changed(self, endpoint: Endpoint, fault: str) -> None:
        if fault:
            self._report.unhealthy(endpoint, fault)
        else:
            self._report.healthy(endpoint)
        self._refresh()

    def _ejected(self, endpoint: Endpoint, seconds: float, why: str) -> None:
        self._report.ejected(endpoint, seconds, why)
        self._refresh()

    def _recovered(self, endpoint: Endpoint) -> None:
        self._report.recovered(endpoint)

    def _regroup(self) -> None:
        self.all = tuple(endpoint for group in self._of_url for endpoint in group)
        self._refresh()

    def _refresh(self) -> None:
        if self._closed:
            return
        down = {endpoint for endpoint in self.all if not endpoint.usable}
        for endpoint in down - self._down:
            self._report.down(endpoint)
        for endpoint in self._down - down:
            self._report.up(endpoint)
        self._down = down
        panicking = len(down) == len(self.all)
        for endpoint in self.all:
            endpoint.live = panicking or endpoint.usable
        if panicking is not self._panicking:
            self._panicking = panicking
            self._report.panic(panicking)
        self._balancer.update(self.all)
