"""What doctor and check say of certificates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.check import check
from core import clock
from core.config import loads
from core.doctor import tls
from core.doctor.findings import Finding, Severity
from tests.support.certificates import Files


def examine(pair: dict[str, str]) -> list[Finding]:
    text = f"gateway: {{tls: {{cert: {pair['cert']}, key: {pair['key']}}}}}"
    return list(tls.examine(loads(text, env={})))


def in_days(days: float) -> datetime:
    return datetime.fromtimestamp(clock.now_ms() / 1000, UTC) + timedelta(days=days)


@pytest.mark.parametrize(
    ("days", "severity", "text"),
    [
        (100.5, Severity.OK, "is valid for 100 days"),
        (13.5, Severity.WARNING, "expires in 13 days"),
        (-1, Severity.CRITICAL, "has expired"),
    ],
)
def test_how_long(days: float, severity: Severity, text: str, tmp_path: Path) -> None:
    pair = Files(tmp_path).pair("a", "api.example.com", not_after=in_days(days))
    (finding,) = examine(pair)
    assert finding.severity is severity
    assert text in finding.text
    assert "api.example.com" in finding.text


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    files = Files(tmp_path)
    a, b = files.pair("a"), files.pair("b")
    (finding,) = examine({**a, "key": b["key"]})
    assert finding.severity is Severity.CRITICAL
    assert "does not belong to the certificate" in finding.text


def test_without_tls_there_is_nothing_to_say() -> None:
    assert list(tls.examine(loads("gateway: {workers: 1}", env={}))) == []


def test_check_says_it_and_the_file_stays_valid(tmp_path: Path) -> None:
    pair = Files(tmp_path).expired("a")
    config = tmp_path / "config.yaml"
    config.write_text(f"gateway: {{tls: {{cert: {pair['cert']}, key: {pair['key']}}}}}")
    result = CliRunner().invoke(check, [str(config)])
    assert result.exit_code == 0, result.output
    assert "critical: gateway.tls" in result.stdout
    assert "has expired" in result.stdout.replace("\n", " ")
