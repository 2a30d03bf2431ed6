"""Intervals against scipy's own tests and printed tables of quantiles."""

import math

import numpy as np
import pytest
from scipy import stats

from vtp.evaluation.intervals import correlation_interval, deviation_interval, mean_interval, slope


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(5, 2, (2, 9)).tolist()


def test_a_mean_has_student_s_interval(values):
    x, _ = values
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert mean_interval(x) == pytest.approx((np.mean(x), expected.low, expected.high, 9))
    three = mean_interval([1.0, 2.0, 4.0])
    assert three.high - three.estimate == pytest.approx(4.3027 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)


def test_of_one_value_there_is_no_interval():
    one, none = mean_interval([3.0]), mean_interval([])
    assert (one.estimate, one.number, none.number) == (3.0, 1, 0)
    assert all(map(math.isnan, (*one[1:3], *none[:3], *deviation_interval([3.0])[:3])))


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([2.0] * 3) == (2.0, 2.0, 2.0, 3)


def test_a_deviation_has_the_interval_of_chi_squared(values):
    x, _ = values
    found = deviation_interval(x)
    assert found.estimate == pytest.approx(np.std(x, ddof=1))
    ends = [math.sqrt(8 / quantile) for quantile in (17.5345, 2.1797)]  # of 8 degrees of freedom, as tables print them
    assert found[1:3] == pytest.approx([found.estimate * end for end in ends], rel=1e-4)


def test_a_correlation_has_fisher_s_interval(values):
    x, y = values
    expected = stats.pearsonr(x, y)
    assert correlation_interval(x, y) == pytest.approx((expected.statistic, *expected.confidence_interval(0.95), 9))
    assert (-correlation_interval(x, y))[:3] == pytest.approx(correlation_interval([-v for v in x], y)[:3])


def test_a_correlation_that_cannot_be_told():
    assert math.isnan(correlation_interval([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]).estimate)
    assert correlation_interval([0.0, 0.0, 1.0, 1.0], [4.0, 4.0, 2.0, 2.0]) == (-1, -1, -1, 4)
    three = correlation_interval([1.0, 2.0, 3.0], [1.0, 2.0, 2.5])
    assert three.estimate > 0.9
    assert math.isnan(three.low)


def test_a_slope_is_that_of_least_squares(values):
    x, y = values
    assert slope(x, y) == pytest.approx(stats.linregress(x, y).slope)
    assert math.isnan(slope([1.0, 1.0], [1.0, 2.0]))
