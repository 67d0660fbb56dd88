"""Every metric of every process: name, labels, unit, meaning. Base units only (seconds, counts).

Labels come from the configuration (routes, plans, upstreams) or from the closed sets written at the
metric, never from a request: a client cannot create a time series.

The hot path does not write here but to `local.LocalMetrics`. Everything else does, directly:
`metrics.flush_seconds.observe(0.012)`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram, values

from core.telemetry import directory as metrics_directory

_ADMISSION_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_UPSTREAM_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_STORE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_Mode = Literal["livesum", "livemax", "livemin"]


class BatchHistogram(Histogram):
    """A histogram that also takes observations already sorted into its buckets."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """Adds `counts[i]` observations to bucket i (the last one is +Inf), `total` to the sum.

        Raises:
            ValueError: as many counts as buckets are needed.
        """
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)

    @property
    def bounds(self) -> tuple[float, ...]:
        """The upper bounds, inclusive, without +Inf."""
        return tuple(self._upper_bounds[:-1])


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"tallygate_{name}", text, labels, registry=None)


def _gauge(name: str, text: str, mode: _Mode, *labels: str) -> Gauge:
    # Only live modes: a dead process must not go on reporting a state.
    return Gauge(f"tallygate_{name}", text, labels, registry=None, multiprocess_mode=mode)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> BatchHistogram:
    return BatchHistogram(f"tallygate_{name}", text, labels, registry=None, buckets=buckets)


class Metrics:
    """The catalogue. Made by `setup`, once a process; safe across fork."""

    def __init__(self, directory: Path, membership: metrics_directory.Membership) -> None:
        self.directory = directory
        self.membership = membership

        # Gateway: requests.
        self.requests = _counter(
            "requests_total",
            "Requests answered, by outcome: admitted, overage, limited (429), unauthorized (401), "
            "payment (402), forbidden (403), unrouted (404, 405), bad_request (400, 408, "
            "413 of ours), static (answered by the route itself), preflight (CORS), "
            "outage (503: no decision), upstream_error (502, 503, 504 of ours), client_gone, "
            "shutdown (cut off after the drain time), error (500 of ours).",
            "route", "plan", "outcome",
        )  # fmt: skip
        self.requests_in_flight = _gauge(
            "requests_in_flight", "Requests being served at this moment.", "livesum"
        )
        self.unreadable_requests = _counter(
            "unreadable_requests_total",
            "What clients sent that is no request and was answered before any route, by the "
            "problem's type; the connection is closed.",
            "code",
        )
        self.client_connections = _gauge(
            "client_connections", "Connections of clients that are open.", "livesum"
        )
        self.client_events = _counter(
            "client_events_total",
            "Connections of clients that were ended early: tls_timeout, tls_refused (no common "
            "version, or no certificate of a client), tls_closed, h2_protocol, h2_resets, "
            "h2_flood, h2_headers, h2_continuations; and grpc, calls answered as unimplemented.",
            "kind",
        )
        self.certificate_expiry = _gauge(
            "certificate_expiry_timestamp_seconds",
            "When a certificate that is shown to clients ends, in seconds since 1970, by file.",
            "livemin",
            "file",
        )
        self.certificate_reloads = _counter(
            "certificate_reloads_total",
            "Certificates read again: applied, or refused and the ones before kept.",
            "result",
        )
        self.admission_seconds = _histogram(
            "admission_seconds",
            "Time a request waited for its decision, batching and Redis included.",
            _ADMISSION_S,
        )
        self.admission_batch_size = _histogram(
            "admission_batch_size", "Checks that shared one script call.", _BATCH
        )
        self.limit_events = _counter(
            "limit_events_total",
            "Things limits reported: refused, shadow_refused, warned, overage, threshold.",
            "kind",
        )
        self.states_seeded = _counter(
            "states_seeded_total",
            "Subjects given their state from the ledger: cold (no state), warm (compared after a "
            "restart of Redis, or completed), rebuilt (Redis came back older than the ledger).",
            "kind",
        )
        self.settlements = _counter(
            "settlements_total",
            "Reservations settled: confirm, refund, renew, cost, progress; lost when Redis did not "
            "answer.",
            "kind",
        )
        self.costs_settled = _counter(
            "costs_settled_total",
            "Costs that the answer decides, by source and what became of the estimate: actual, "
            "aborted_<on_abort>, kept_<reason>, and taken back: unpaid, unanswered, unserved.",
            "meter", "source", "result",
        )  # fmt: skip
        self.cost_units = _counter(
            "cost_units_total",
            "Smallest units of meters whose cost the answer decides: estimated, charged.",
            "meter", "which",
        )  # fmt: skip
        self.outage_admitted = _counter(
            "outage_admitted_total",
            "Requests admitted without a decision, by outage mode: open, local.",
            "mode",
        )
        self.replayed = _counter(
            "replayed_total",
            "Entries of the spool counted in Redis: admitted (added), refunded (of lost answers).",
            "kind",
        )
        self.spool_pending = _gauge(
            "spool_pending_records", "Entries that wait for Redis to count them.", "livesum"
        )
        self.spool_trouble = _counter(
            "spool_trouble_total",
            "What went wrong with the spool: unavailable, tail_cut (bytes), lost (records), "
            "damaged (files), unresolved_lost (batches that may have counted what was not served).",
            "kind",
        )
        self.key_cache_hits = _counter(
            "key_cache_hits_total", "Keys found in a worker's cache: valid or invalid.", "kind"
        )
        self.key_cache_misses = _counter(
            "key_cache_misses_total", "Keys that had to be looked up: valid, invalid.", "kind"
        )
        self.upstream_seconds = _histogram(
            "upstream_seconds",
            "Time from sending a request upstream to the head of its response.",
            _UPSTREAM_S,
            "upstream",
        )
        self.upstream_errors = _counter(
            "upstream_errors_total",
            "Requests that failed at an upstream, by code: see docs/upstreams.md.",
            "upstream", "kind",
        )  # fmt: skip
        self.upstream_targets_down = _gauge(
            "upstream_targets_down",
            "Addresses of a URL that a worker sends nothing to, unhealthy or ejected; 0 is good.",
            "livesum",
            "upstream", "target",
        )  # fmt: skip
        self.upstream_ejections = _counter(
            "upstream_ejections_total",
            "Times a target was left out because requests failed there.",
            "upstream", "target",
        )  # fmt: skip
        self.upstream_checks = _counter(
            "upstream_checks_total", "Health checks: ok, failed.", "upstream", "result"
        )
        self.upstream_breaker_state = _gauge(
            "upstream_breaker_state",
            "The worst circuit breaker of any worker: 0 closed, 1 half open, 2 open.",
            "livemax",
            "upstream",
        )
        self.upstream_breaker_changes = _counter(
            "upstream_breaker_changes_total",
            "Transitions of circuit breakers, to: open, half_open, closed.",
            "upstream", "to",
        )  # fmt: skip
        self.upstream_retries = _counter(
            "upstream_retries_total",
            "Tries after the first: connect, reset, timeout, status, stale (a kept connection that "
            "the upstream had closed); budget: refused, as too many failed.",
            "upstream", "cause",
        )  # fmt: skip
        self.upstream_connections = _gauge(
            "upstream_connections", "Connections: in_use, idle.", "livesum", "upstream", "state"
        )
        self.upstream_waiting = _gauge(
            "upstream_waiting", "Requests that wait for a connection.", "livesum", "upstream"
        )
        self.upstream_dns_failures = _counter(
            "upstream_dns_failures_total", "Names that could not be resolved any more.", "upstream"
        )

        # Gateway: WebSockets.
        self.websockets = _gauge("websockets", "WebSockets that are open.", "livesum", "route")
        self.websocket_messages = _counter(
            "websocket_messages_total",
            "Messages passed on, by direction: in (of clients), out.",
            "route", "direction",
        )  # fmt: skip
        self.websocket_bytes = _counter(
            "websocket_bytes_total",
            "Bytes of payload passed on, as they were on the wire.",
            "route", "direction",
        )  # fmt: skip
        self.websocket_closed = _counter(
            "websocket_closed_total",
            "WebSockets that ended, by who ended them (client, upstream, gateway) and close code: "
            "1000 to 1015, 3xxx, 4xxx, other; 1006 is a connection lost.",
            "route", "who", "code",
        )  # fmt: skip

        # All processes.
        self.processes = _gauge(
            "processes", "Processes alive, workers counted.", "livesum", "process"
        )
        self.redis_errors = _counter(
            "redis_errors_total",
            "Failed Redis calls: timeout, connection, script, readonly, oom, other.",
            "kind",
        )
        self.postgres_seconds = _histogram(
            "postgres_seconds", "Time of a named Postgres query.", _STORE_S, "query"
        )
        self.postgres_errors = _counter(
            "postgres_errors_total", "Failed Postgres calls, time-outs included."
        )
        self.config_reloads = _counter(
            "config_reloads_total", "Configuration loads: applied, refused, unchanged.", "result"
        )
        # Named for the bad case: a value that was never set is 0, also in a forked child.
        self.config_stale = _gauge(
            "config_stale", "1 while a process runs on after refusing a new file.", "livemax"
        )
        self.config_info = _gauge(
            "config_info",
            "1 for each configuration a process runs; two series at 1 are two configurations.",
            "livemax",
            "digest",
        )
        self.log_lines_dropped = _counter(
            "log_lines_dropped_total", "Log lines dropped because their reader stalled."
        )

        # Reconciler.
        self.flush_lag_seconds = _gauge(
            "flush_lag_seconds", "Age of the oldest count that is not in the ledger yet.", "livemax"
        )
        self.dirty_subjects = _gauge(
            "dirty_subjects", "Subjects with counts that are not in the ledger yet.", "livemax"
        )
        self.flush_subjects = _counter("flush_subjects_total", "Subjects copied into the ledger.")
        self.flush_seconds = _histogram("flush_seconds", "Time of one flush.", _STORE_S)
        self.usage_events = _counter("usage_events_total", "Usage events stored in Postgres.")
        self.states_lost = _counter(
            "states_lost_total",
            "Subjects with changes not in the ledger yet whose state was gone from Redis.",
        )
        self.subjects_evicted = _counter(
            "subjects_evicted_total", "Idle subjects taken out of Redis; the ledger has them."
        )

        self.drift = _gauge(
            "drift",
            "Differences that the last audit found and left, by cause: see core/audit/report.py.",
            "livemax",
            "cause",
        )
        self.reconciler_leader = _gauge(
            "reconciler_leader", "1 for the reconciler that works, 0 for one in waiting.", "livesum"
        )
        self.periods_sealed = _counter("periods_sealed_total", "Billing periods sealed.")
        self.periods_resealed = _counter(
            "periods_resealed_total",
            "Periods sealed again, as they changed after they were sealed.",
        )
        self.seal_lag_seconds = _gauge(
            "seal_lag_seconds",
            "Age of the oldest ended period that is not sealed, from reconciler.seal_after on.",
            "livemax",
        )
        self.hours_partitions = _counter("hours_partitions_total", "Partitions of hours made.")
        self.hours_months_rolled = _counter(
            "hours_months_rolled_total", "Months of hours that became days."
        )

        self._config_digest: str | None = None

    def config_applied(self, digest: str) -> None:
        """A configuration is in force: `digest` identifies its content."""
        if self._config_digest is not None and self._config_digest != digest:
            self.config_info.labels(self._config_digest).set(0)
        self._config_digest = digest
        self.config_info.labels(digest).set(1)
        self.config_stale.set(0)
        self.config_reloads.labels("applied").inc()

    def config_refused(self) -> None:
        """A new configuration was refused; the old one stays in force."""
        self.config_stale.set(1)
        self.config_reloads.labels("refused").inc()


def setup(directory: str | Path | None, process: str) -> Metrics:
    """Joins the metrics directory and makes the catalogue; before the first metric is written.

    Args:
        directory: `telemetry.metrics_dir`; None takes `TALLYGATE_METRICS_DIR` or a private one.
        process: gateway, control or reconciler.

    Raises:
        OSError: the directory cannot be created or written.
    """
    path = Path(directory) if directory else metrics_directory.resolve(None)
    membership = metrics_directory.Membership(path, process)
    # prometheus_client reads the variable whenever it opens a file, and takes the value class when
    # a metric is made, so no import order is needed.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(path)
    values.ValueClass = values.MultiProcessValue(membership.identity)  # type: ignore[no-untyped-call]
    metrics = Metrics(path, membership)
    metrics.processes.labels(process).set(1)
    return metrics
