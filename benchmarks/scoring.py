"""How well a score tells runs that diverge from runs that do not."""

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
    """None where all runs ended alike. A score that is not finite counts as the highest when it is +inf, else lowest.

    The bootstrap resamples runs, diverged and healthy ones apart, so that both are always there.
    """
    labels, values = np.asarray(diverged, dtype=bool), np.nan_to_num(np.asarray(scores, dtype=float), nan=-1e300)
    values = np.clip(values, -1e300, 1e300)
    bad, good = values[labels], values[~labels]
    if not len(bad) or not len(good):
        return None

    def area(positive: Any, negative: Any, axis: int = -1) -> Any:
        """The share of pairs in order, ties counted half (Mann-Whitney)."""
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
    """Where every resample gives the same area the bootstrap is blind: the Clopper-Pearson bound on the smaller group
    takes its place (not one of `n` runs misplaced)."""
    bound = float(stats.binomtest(0, min(num_bad, num_good)).proportion_ci(0.95).high)
    return (1.0 - bound, 1.0) if value == 1.0 else (0.0, bound) if value == 0.0 else (0.0, 1.0)
