"""What the regression guard makes of its ratios, and of a checkout without the release before."""

import pytest

from benchmarks.guard import UnavailableError, Verdict, baseline, lower_bound, tree


def test_the_bound_is_the_order_statistic_that_the_sign_test_allows():
    values = [1.9, 1.1, 1.5, 1.3, 1.2, 1.7, 1.4, 1.8, 1.6]

    # nine: P(at most one below the median) = 10/512 = 2 %; at most two: 46/512 = 9 %
    assert lower_bound(values) == 1.2
    assert lower_bound(values[:5]) == 1.1  # 1/32: only the smallest will do


def test_too_few_ratios_bound_nothing():
    with pytest.raises(ValueError, match="too few"):
        lower_bound([1.0, 1.0, 1.0, 1.0])


def test_half_as_much_again_is_slower_whatever_one_round_says():
    assert Verdict("admitted", (1.5, 1.52, 1.47, 0.4, 1.6, 1.49, 1.55, 1.5, 1.44)).slower


def test_noise_alone_is_not():
    assert not Verdict("admitted", (1.5, 0.7, 1.9, 1.1, 2.4, 0.9, 1.3, 1.6, 1.05)).slower


def test_a_commit_that_is_not_in_the_checkout_is_nothing_to_compare_with():
    missing = "0" * 40
    with pytest.raises(UnavailableError, match="not in this checkout"), tree(missing):
        pass


def test_the_baseline_is_one_revision():
    assert len(baseline().split()) == 1
