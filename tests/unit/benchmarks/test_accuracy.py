"""The checks of `make load`: each kind of wrong decision is found, right ones are not."""

import random

from benchmarks.accuracy import findings, rate_findings

KEY = "tg_live_0123456789"


def _report(statuses: dict[str, int], **more: object) -> dict[str, object]:
    return {"by_key": {KEY: statuses}, "wrong": {}, "decisions": {}} | more


def _bucket(rate: float, burst: float, seed: int) -> list[tuple[float, float, bool]]:
    """Decisions of a right limiter, each at a time that its client only knows within bounds."""
    chance, now, fill, last = random.Random(seed), 0.0, 0.0, 0.0
    found = []
    for _ in range(800):
        sent = now
        decided = sent + chance.uniform(0, 0.02)
        fill, last = max(0.0, fill - rate * (decided - last)), decided
        admitted = fill + 1 <= burst
        fill += admitted
        now = decided + chance.uniform(0, 0.02)
        found.append((sent, now, admitted))
        now += chance.choice([0] * 99 + [1.0])
    return found


def test_a_right_rate_limit_is_found_right_whatever_the_latency():
    for seed in range(20):
        sequence = _bucket(20, 40, seed)
        assert {admitted for _, _, admitted in sequence} == {True, False}
        assert rate_findings({KEY: sequence}, 20, 40) == []


def test_a_limit_that_lets_too_much_through_is_found():
    assert "above its rate" in rate_findings({KEY: _bucket(25, 40, 1)}, 20, 40)[0]
    assert "above its rate" in rate_findings({KEY: _bucket(20, 44, 1)}, 20, 40)[0]


def test_a_limit_that_refuses_too_early_is_found():
    assert "below its rate" in rate_findings({KEY: _bucket(20, 36, 1)}, 20, 40)[0]


def test_served_and_counted_have_to_agree():
    lost = findings(_report({"200": 10}), {KEY: 9}, {KEY: 9}, kind="none")
    doubled = findings(_report({"200": 10}), {KEY: 11}, {KEY: 11}, kind="none")
    behind = findings(_report({"200": 10}), {KEY: 10}, {KEY: 9}, kind="none")

    assert "10 served, 9 counted" in lost[0]
    assert "10 served, 11 counted" in doubled[0]
    assert "9 in the ledger" in behind[0]
    assert findings(_report({"200": 10}), {KEY: 10}, {KEY: 10}, kind="none") == []


def test_a_quota_is_exact_in_both_directions():
    over = findings(
        _report({"200": 101, "429": 50}), {KEY: 101}, {KEY: 101}, kind="quota", quota=100
    )
    under = findings(_report({"200": 99, "429": 50}), {KEY: 99}, {KEY: 99}, kind="quota", quota=100)
    right = findings(
        _report({"200": 100, "429": 50}), {KEY: 100}, {KEY: 100}, kind="quota", quota=100
    )

    assert "101 admitted" in over[0]
    assert "99 admitted" in under[0]
    assert right == []


def test_a_neighbour_within_its_limits_is_never_refused():
    report = _report({"200": 10, "429": 1})

    assert findings(report, {KEY: 10}, {KEY: 10}, kind="any") == []
    assert "within its limits" in findings(report, {KEY: 10}, {KEY: 10}, kind="any", quiet=[KEY])[0]


def test_an_answer_that_never_came_may_be_counted_or_not_but_is_reported():
    report = _report({"200": 10, "0": 1})

    for total in (10, 11):
        found = findings(report, {KEY: total}, {KEY: total}, kind="none")
        assert [text for text in found if "unexpected" in text] == found


def test_malformed_refusals_are_reported():
    report = _report({"200": 1}, wrong={"429 without Retry-After": 3})

    assert findings(report, {KEY: 1}, {KEY: 1}, kind="none") == ["429 without Retry-After: 3 times"]
