"""A confirmation that nobody waits for any more does nothing: its answer was not served."""

from __future__ import annotations

import pytest

from core.admission.program import compile_program
from core.admission.settlement import Settled
from core.policy import Action, PeriodKind, Quota
from tests.integration.admission.stack import METERS
from tests.support.scripts import Scripts, plan_of

PLAN = plan_of(Quota("monthly", "requests", 1, PeriodKind.BILLING, Action.OVERAGE))
PROGRAM = compile_program(PLAN, {"requests": 2}, METERS, {}, reserve_ms=60_000)
NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize("expired", [False, True])
def test_late_it_leaves_the_reservation_as_it_is(any_redis_url: str, expired: bool) -> None:
    scripts = Scripts(any_redis_url)
    scripts.at(NOW_MS * 1000)
    scripts.seed("s")
    assert scripts.admit("s", PROGRAM, lease="r").admitted
    if expired:
        scripts.at((NOW_MS + 60_001) * 1000)
        assert scripts.settle(("expire", "s", "r")) == [Settled.DONE]
    before = scripts.state("s")
    assert scripts.settle(("confirm", "s", "r", scripts.now_ms - 1)) == [Settled.LATE]
    assert scripts.state("s") == before
    # in time it confirms; what was late can still be refunded, or confirmed by whoever served it
    assert scripts.settle(("refund", "s", "r")) == [Settled.DONE]
    assert scripts.state("s")["m:requests"].startswith("0 0 0 0 ")


def test_in_time_it_confirms(any_redis_url: str) -> None:
    scripts = Scripts(any_redis_url)
    scripts.at(NOW_MS * 1000)
    scripts.seed("s")
    assert scripts.admit("s", PROGRAM, lease="r").admitted
    assert scripts.settle(("confirm", "s", "r", NOW_MS)) == [Settled.DONE]
    assert scripts.settle(("confirm", "s", "r", NOW_MS - 1)) == [Settled.GONE]
    assert scripts.state("s")["m:requests"].startswith("2 1 2 1 ")
