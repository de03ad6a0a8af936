"""Separation of diverging and healthy runs by a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

RESAMPLES = 2000

Numbers: TypeAlias = "Sequence[float] | np.ndarray[Any, Any]"


@dataclass(frozen=True, slots=True)
class Auroc:
    """Area under the ROC curve and its 95% bootstrap interval; `num_diverged` of `num_runs` runs are positive."""

    value: float
    low: float
    high: float
    num_runs: int
    num_diverged: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auroc(diverged: Sequence[bool], scores: Numbers, *, seed: int = 0) -> Auroc | None:
    """Compute the area; None if all runs have one outcome. A score of +inf is the highest, another non-finite one the
    lowest.

    The bootstrap resamples diverged and healthy runs separately, so both are always present.
    """
    labels, values = np.asarray(diverged, dtype=bool), np.nan_to_num(np.asarray(scores, dtype=float), nan=-1e300)
    values = np.clip(values, -1e300, 1e300)
    bad, good = values[labels], values[~labels]
    if not len(bad) or not len(good):
        return None

    def area(positive: Any, negative: Any, axis: int = -1) -> Any:
        """Return the share of ordered pairs; ties count half (Mann-Whitney)."""
        both = np.concatenate([positive, negative], axis=axis)
        num = positive.shape[axis]
        ranks = stats.rankdata(both, axis=axis).take(range(num), axis=axis).sum(axis=axis)
        return (ranks / num - (num + 1) / 2) / negative.shape[axis]

    value = float(area(bad, good))
    if min(len(bad), len(good)) < 2 or value in (0.0, 1.0):
        low, high = _exact(value, len(bad), len(good))
    else:
        interval = stats.bootstrap(
            (bad, good),
            area,
            n_resamples=RESAMPLES,
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Auroc(value, low, high, len(labels), len(bad))


def _exact(value: float, num_bad: int, num_good: int) -> tuple[float, float]:
    """Return the Clopper-Pearson bound for the smaller group, with none of `n` runs misplaced.

    It replaces the bootstrap if every resample has the same area.
    """
    bound = float(stats.binomtest(0, min(num_bad, num_good)).proportion_ci(0.95).high)
    return (1.0 - bound, 1.0) if value == 1.0 else (0.0, bound) if value == 0.0 else (0.0, 1.0)
