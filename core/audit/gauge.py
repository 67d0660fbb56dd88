"""An audit's outcome as a metric."""

from __future__ import annotations

from core.audit.report import AuditReport
from core.telemetry.metrics import Metrics


def publish(metrics: Metrics, report: AuditReport) -> None:
    """Sets `tallygate_drift{cause}` to what the audit left, every cause, those without any to 0."""
    for cause, count in report.left.items():
        metrics.drift.labels(str(cause)).set(count)
