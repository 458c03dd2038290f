import pytest

from db.proportion import clustered_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (2000, 2000, 0.9981, 1.0)],
)
def test_wilsons_interval_is_that_of_the_textbooks(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_without_a_trial_anything_may_be():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_answers_that_fail_together_tell_less():
    scattered = clustered_interval([9] * 100, [10] * 100)
    together = clustered_interval([10] * 90 + [0] * 10, [10] * 100)
    assert scattered == pytest.approx(wilson_interval(900, 1000))
    # All or nothing: as if each query were one trial, but for the n/(n-1) of a sample variance.
    assert together == pytest.approx(wilson_interval(90, 100), abs=1e-3)


def test_a_single_cluster_and_no_failure_at_all_are_wilsons():
    assert clustered_interval([7], [10]) == wilson_interval(7, 10)
    assert clustered_interval([10] * 5, [10] * 5) == wilson_interval(50, 50)
