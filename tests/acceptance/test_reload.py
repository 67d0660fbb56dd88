"""The configuration changes under load: no request fails, no count is lost, a typo is refused."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.acceptance.catalogue import config, plan
from tests.support import wait_until
from tests.support.load import Load, get
from tests.support.stack import Stack

WORKERS = 2
IN_FORCE_S = 2.0


def _config(limit: int, more: str = "") -> str:
    """Each limit comes with another time-out, so that the upstream's connections change, too."""
    text = config(
        plan("sold", f"monthly: {{period: billing, limit: {limit}}}")
        + plan("busy", "monthly: {period: billing, limit: 1000000}")
    )
    upstream = '["${UPSTREAM}"]'
    assert upstream in text
    return text.replace(upstream, f"{upstream}, timeout: {{response: {limit}s}}") + more


def _digests(stack: Stack) -> set[str]:
    """The configurations in force, as a sample of connections that reaches all workers says."""
    return {stack.get("/-/readyz").json()["config"] for _ in range(8)}


def _applied(stack: Stack) -> float:
    return stack.metric("tallygate_config_reloads_total", result="applied")


def _refused(stack: Stack) -> float:
    return stack.metric("tallygate_config_reloads_total", result="refused")


def _limits(stack: Stack, key: str) -> set[str]:
    return {stack.get("/api/x", key).headers["x-ratelimit-limit"] for _ in range(16)}


def test_limits_change_under_load_and_a_bad_file_does_not(
    own_stack: Callable[..., Stack], load: Load
) -> None:
    stack = own_stack(_config(1000), gateways=(WORKERS,))
    (gateway,) = stack.gateways
    sold, busy = stack.subscribe("sold"), stack.subscribe("busy")
    use = get("/api/x", sold.key, who=sold.id)
    with Load(1) as customers:
        assert customers.run(stack.ports, [use], connections=16, total=1200).count(200) == 1000

        noise = get("/api/x", busy.key, who=busy.id)
        load.start(stack.ports, [noise], connections=12)
        try:
            # A file changed: within two seconds in every worker (and in the reconciler).
            first = _digests(stack)
            assert len(first) == 1
            stack.write_config(_config(1500))
            processes = WORKERS + 1
            wait_until(lambda: _applied(stack) == 2 * processes, IN_FORCE_S, "the new file applied")
            assert _limits(stack, sold.key) == {"1500"}  # these 16 count, if admitted
            outcome = customers.run(stack.ports, [use], connections=16, total=700)
            assert outcome.count(200) == 500 - 16
            assert stack.state(sold)["requests"].total == 1500

            # Lowered below what was used: refused, and nothing is forgotten.
            stack.write_config(_config(1200))
            wait_until(lambda: _applied(stack) == 3 * processes, IN_FORCE_S, "the lower limit")
            assert stack.get("/api/x", sold.key).status_code == 429

            # A file with a mistake: the old one stays, the metric tells.
            assert stack.metric("tallygate_config_stale") == 0
            stack.write_config(_config(1600, "  broken: {limits: {x: {window: 1d}}}\n"))
            wait_until(lambda: _refused(stack) == processes, IN_FORCE_S, "the bad file refused")
            assert stack.metric("tallygate_config_stale") == 1
            assert _limits(stack, sold.key) == {"1200"}
            stack.write_config("{")
            wait_until(lambda: _refused(stack) == 2 * processes, IN_FORCE_S, "no YAML refused")
            assert _limits(stack, sold.key) == {"1200"}

            # A valid file that cannot follow this one: what was counted would be read in another
            # unit.
            other_unit = _config(1600).replace("{unit: credit}", "{unit: credit, decimals: 2}")
            assert other_unit != _config(1600)
            stack.write_config(other_unit)
            wait_until(lambda: _refused(stack) == 3 * processes, IN_FORCE_S, "a new unit refused")
            assert _limits(stack, sold.key) == {"1200"}

            # Mended: applied, and the metric is back.
            stack.write_config(_config(1510))
            wait_until(lambda: _applied(stack) == 4 * processes, IN_FORCE_S, "the mended file")
            assert stack.metric("tallygate_config_stale") == 0
            assert customers.run(stack.ports, [use], connections=4, total=20).count(200) == 10

            # SIGHUP reads the file, changed or not, in every worker of the gateway.
            gateway.signal(signal.SIGHUP)
            wait_until(
                lambda: _applied(stack) == 4 * processes + WORKERS, IN_FORCE_S, "SIGHUP obeyed"
            )
            assert _limits(stack, sold.key) == {"1510"}
        finally:
            outcome = load.stop()
    assert (outcome.lost, outcome.closed) == (0, 0), "connections were dropped"
    assert outcome.all_statuses() == {200}, "requests failed while the configuration changed"
    assert outcome.total > 1000
    stack.quiet()
    assert stack.ledger(sold)["requests"].total == 1510 == stack.served(sold.id) + 16
    assert stack.ledger(busy)["requests"].total == outcome.total == stack.served(busy.id)
