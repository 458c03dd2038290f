"""How sure a measured share is."""

from collections.abc import Sequence
from math import sqrt

_Z = 1.959964  # two-sided 95 % of the normal distribution


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % score interval of a share, `successes` of `trials`; (0, 1) without a trial.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927), 209-212.
    """
    if trials <= 0:
        return 0.0, 1.0
    share, square = successes / trials, _Z * _Z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = _Z / (1 + square / trials) * sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_interval(successes: Sequence[int], trials: Sequence[int]) -> tuple[float, float]:
    """The 95 % score interval of a share whose trials come in clusters, such as the k answers of one query.

    Answers of one query fail together, so k x n trials tell less than as many independent ones. Wilson's interval is
    taken over the trials divided by the design effect, the variance between clusters over the binomial one, which
    is never less than 1 here: L. Kish, Survey Sampling (1965), 8.2; the variance is that of a ratio estimate.
    """
    total, clusters = sum(trials), len(trials)
    share = sum(successes) / total if total else 0.0
    if clusters < 2 or share in (0.0, 1.0):
        return wilson_interval(sum(successes), total)
    squares = sum((s - share * t) ** 2 for s, t in zip(successes, trials, strict=True))
    variance = clusters / (clusters - 1) * squares / total**2
    effect = max(1.0, variance / (share * (1 - share) / total))
    return wilson_interval(share * total / effect, total / effect)
