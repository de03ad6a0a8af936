"""Every detector as a function of one recording: a score per profiled step, higher means more alarm. All are causal.

Ours is the one that the monitor runs. The baselines are what others watch, each in its usual form. Some stand there
once more with a prior, which is no part of the product yet: the log-odds of divergence by the learning rate and the
share of reliable modes in the first online profile, from a fit on the runs of other residual schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from benchmarks.campaign import Kept
from benchmarks.training import Recipe
from koopmon.config import RiskConfig
from koopmon.risk.calibration import Example, fit
from koopmon.risk.online import Observation, RiskState, assess

Series: TypeAlias = "np.ndarray[Any, Any]"
Detector = Callable[[Kept[Recipe]], Series]

WINDOW = 20
"""Steps that a z-score looks back on."""
DRIFT = 0.5
"""Of the cumulative sum, in standard deviations: half of the shift to be found, the textbook's choice for 1."""
LARGEST = 1e12
LEAST_EVIDENCE = 0.05
LARGEST_LOGIT = 24.0
"""Beyond it no evidence would count."""


def online_risk(run: Kept[Recipe], config: RiskConfig | None = None) -> Series:
    """koopmon's own, as unsteadiness v (risk is v^4 / (1 + v^4), the same order)."""
    config = config or RiskConfig()
    state, scores = RiskState(), []
    series = run.series
    for row, step in enumerate(series["profile_step"]):
        ratios = series["update_ratio"][row]
        observation = Observation(
            step=int(step),
            informative=bool(series["informative"][row]),
            non_finite=bool(np.isnan(ratios).any()),
            update_ratios=tuple(ratios.tolist()),
            near_unit_mass=float(np.mean(series["near_unit_mass"][row])),
        )
        state, risk = assess(state, observation, config)
        scores.append(LARGEST if observation.non_finite else risk.components.get("unsteadiness", 0.0))
    return np.array(scores)


def z_score(values: Series) -> Series:
    """Of each value against the `WINDOW` before it; 0 until there are five."""
    scores = np.zeros(len(values))
    for t in range(5, len(values)):
        before = values[max(0, t - WINDOW) : t]
        scores[t] = (values[t] - before.mean()) / (before.std() + 1e-3 * abs(before.mean()) + 1e-12)
    return _finite(scores)


def cusum(values: Series) -> Series:
    """Cumulative sum of the z-scores above `DRIFT`, never below 0; one z-score counts 10 at most."""
    total, scores = 0.0, []
    for z in z_score(values):
        total = max(0.0, total + min(z, 10.0) - DRIFT)
        scores.append(total)
    return np.array(scores)


def _finite(values: Series) -> Series:
    return np.nan_to_num(values, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)


def _profiled(name: str, of: Callable[[Series], Series]) -> Detector:
    """A detector of a scalar series that has one value for every step, read at the profiled ones."""
    return lambda run: _finite(of(run.series[name]))[run.series["profile_step"]]


def _spectral(name: str, sign: float = 1.0) -> Detector:
    """The mean over layers of a field, as a log ratio to the run's start."""

    def score(run: Kept[Recipe]) -> Series:
        values = run.series[name].mean(1)
        return _finite(sign * np.log((values + 1e-3) / (values[0] + 1e-3)))

    return score


def _level(name: str, sign: float = 1.0) -> Detector:
    return lambda run: _finite(sign * run.series[name])


def with_prior(detector: Detector, logits: Mapping[Recipe, float]) -> Detector:
    """`detector`, its evidence and the prior's joined as log-odds: the risk v^4 / (1 + v^4) has 4 log v of them."""

    def score(run: Kept[Recipe]) -> Series:
        evidence = 4 * np.log(np.maximum(detector(run), 0.0) + LEAST_EVIDENCE)
        return np.asarray(evidence + np.clip(logits[run.case], -LARGEST_LOGIT, LARGEST_LOGIT))

    return score


def prior_logits(runs: Sequence[Kept[Recipe]]) -> dict[Recipe, float]:
    """Of every run, by a fit on those of other schemes that had no fault and an informative first profile."""

    def example(run: Kept[Recipe]) -> Example:
        return Example(
            reliable_mode_ratio=float(run.series["reliable_mode_ratio"][0].mean()),
            learning_rate=run.case.lr,
            width=run.case.width,
            num_layers=run.case.num_layers,
            diverged=run.scalars["died_at"] is not None,
        )

    usable = [run for run in runs if not run.case.fault and run.scalars["initial"]["informative"]]
    models = {
        norm: fit([example(run) for run in usable if run.case.norm != norm]) for norm in {run.case.norm for run in runs}
    }
    return {run.case: models[run.case.norm].logit(example(run)) for run in runs}


DETECTORS: Mapping[str, Detector] = {
    "koopmon risk": online_risk,
    "update ratio / start": _spectral("update_ratio"),
    "expansive mass / start": _spectral("expansive_mass"),
    "spectral radius / start": _spectral("spectral_radius"),
    "near-unit mass, fallen": _spectral("near_unit_mass", -1.0),
    "kappa(V) / start": _spectral("eigenvector_condition_number"),
    "gradient norm z-score": _profiled("grad_norm", z_score),
    "gradient norm CUSUM": _profiled("grad_norm", cusum),
    "gradient norm": _profiled("grad_norm", lambda values: values),
    "loss z-score": _profiled("loss", z_score),
    "loss CUSUM": _profiled("loss", cusum),
    "activation kurtosis": _level("kurtosis"),
    "max attention logit": _level("max_attention_logit"),
    "query-key entropy, low": _level("query_key_entropy", -1.0),
    "spectral alignment": _level("alignment"),
}
WITH_PRIOR = ("koopmon risk", "gradient norm", "loss z-score")
