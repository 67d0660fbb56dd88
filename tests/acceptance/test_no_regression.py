"""This tree against the release before, on the same machine in the same run: ratios only."""

import pytest

from benchmarks import guard


def test_a_request_does_not_cost_more_than_in_the_release_before():
    try:
        with guard.tree(guard.baseline()) as before:
            verdicts = guard.guard(before)
    except guard.UnavailableError as error:
        pytest.skip(f"nothing to compare with: {error}")

    for verdict in verdicts:
        print(verdict)
    assert not [str(verdict) for verdict in verdicts if verdict.slower]
