"""Epochs to reach a distance, in closed form."""

import pytest

from vtp.evaluation.convergence import EpochsToReach, epochs_to_reach

CURVE = {8.0: 5.0, 2.0: 40.0, 4.0: 20.0, 6.0: 10.0}  # in no order


@pytest.mark.parametrize(
    ("distance", "reached"),
    [
        (20.0, EpochsToReach(4.0, 4.0)),
        (15.0, EpochsToReach(6.0, 5.0)),
        (12.5, EpochsToReach(6.0, 5.5)),
        (5.0, EpochsToReach(8.0, 8.0)),
        (40.0, EpochsToReach(2.0, None)),  # nothing is known of what was before the first evaluation
        (50.0, EpochsToReach(2.0, None)),
        (4.9, None),
    ],
)
def test_the_first_evaluation_at_or_below_and_the_line_that_leads_to_it(distance, reached):
    assert epochs_to_reach(distance, CURVE) == reached


def test_a_later_rise_takes_nothing_back():
    assert epochs_to_reach(10.0, {1.0: 30.0, 2.0: 10.0, 3.0: 12.0, 4.0: 9.0}) == EpochsToReach(2.0, 2.0)
    assert epochs_to_reach(10.0, {1.0: 12.0, 2.0: 30.0, 3.0: 10.0}) == EpochsToReach(3.0, 3.0)
    assert epochs_to_reach(10.0, {}) is None
