"""Detectors as functions of one recording: one score per profiled step, higher for more alarm. All are causal.

koopmon's detectors are those of the monitor. The baselines are common statistics in their usual form. Two of them also
appear with koopmon's prior, from the rate and the normalisation of the layers. The loss with this prior is the
monitor's forecast for scripts that log their loss, one step earlier than the monitor can compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from benchmarks.campaign import Kept
from benchmarks.training import Recipe, warmed
from koopmon.config import RiskConfig
from koopmon.risk.online_detector import Observation, OnlineRisk, RiskState, assess
from koopmon.wire.messages import TrainingStep

Series: TypeAlias = "np.ndarray[Any, Any]"
Detector = Callable[[Kept[Recipe]], Series]

WINDOW = 20
"""Number of earlier steps of a z-score."""
DRIFT = 0.5
"""Drift of the cumulative sum, in standard deviations: half of the shift to detect, the usual choice for a shift of 1.
"""
LARGEST = 1e12
LEAST_EVIDENCE = 0.05
MEANS = ("near_unit_mass", "expansive_mass", "reliable_mode_ratio")


def online(run: Kept[Recipe], config: RiskConfig | None = None, *, logged: bool = False) -> list[OnlineRisk]:
    """Run the monitor's detector at each profiled step, with the rate of that step.

    With `logged`, it uses the loss of the step before, because a snapshot is sent before the loss of its step is known.
    """
    config = config or RiskConfig()
    exponent = run.scalars["initial"]["update_exponent"]
    state, risks = RiskState(), []
    for row, step in enumerate(run.series["profile_step"]):
        ratios = run.series["update_ratio"][row]
        informative = bool(run.series["informative"][row])
        means: dict[str, Any] = {name: float(run.series[name][row].mean()) for name in MEANS if informative}
        observation = Observation(
            training=TrainingStep(
                step=int(step),
                learning_rate=run.case.lr * warmed(run.case, int(step)),
                loss=float(run.series["loss"][step - 1]) if logged and step > 0 else None,
            ),
            informative=informative,
            non_finite=bool(np.isnan(ratios).any()),
            update_ratios=tuple(ratios.tolist()),
            width=run.case.width,
            num_layers=run.case.num_layers,
            update_exponent=exponent,
            **means,
        )
        state, risk = assess(state, observation, config)
        risks.append(risk)
    return risks


def _log_odds(probabilities: Sequence[float]) -> Series:
    values = np.clip(np.array(probabilities), 1e-30, 1 - 1e-15)
    return np.asarray(np.log(values) - np.log1p(-values))


def online_risk(run: Kept[Recipe]) -> Series:
    """koopmon's risk, which starts actions, as log-odds."""
    return _log_odds([risk.value for risk in online(run)])


def forecast(run: Kept[Recipe]) -> Series:
    """koopmon's forecast, which warns, as log-odds."""
    return _log_odds([risk.forecast for risk in online(run)])


def forecast_by_loss(run: Kept[Recipe]) -> Series:
    """koopmon's forecast with a logged loss, as log-odds."""
    return _log_odds([risk.forecast for risk in online(run, logged=True)])


def unsteadiness(run: Kept[Recipe]) -> Series:
    """Evidence of the risk without its prior."""
    found = [risk.components.get("unsteadiness", 0.0 if risk.value < 1 else LARGEST) for risk in online(run)]
    return np.array(found)


def z_score(values: Series) -> Series:
    """z-score of each value against the `WINDOW` values before it; 0 with fewer than five."""
    scores = np.zeros(len(values))
    for t in range(5, len(values)):
        before = values[max(0, t - WINDOW) : t]
        scores[t] = (values[t] - before.mean()) / (before.std() + 1e-3 * abs(before.mean()) + 1e-12)
    return _finite(scores)


def cusum(values: Series) -> Series:
    """Cumulative sum of the z-scores above `DRIFT`, at least 0; one z-score counts 10 at most."""
    total, scores = 0.0, []
    for z in z_score(values):
        total = max(0.0, total + min(z, 10.0) - DRIFT)
        scores.append(total)
    return np.array(scores)


def _finite(values: Series) -> Series:
    return np.nan_to_num(values, nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)


def _profiled(name: str, of: Callable[[Series], Series]) -> Detector:
    """Return a detector of a scalar series with one value per step, read at the profiled steps."""
    return lambda run: _finite(of(run.series[name]))[run.series["profile_step"]]


def _spectral(name: str, sign: float = 1.0) -> Detector:
    """Mean over layers of a field, as a log ratio to the run's start."""

    def score(run: Kept[Recipe]) -> Series:
        values = run.series[name].mean(1)
        return _finite(sign * np.log((values + 1e-3) / (values[0] + 1e-3)))

    return score


def _level(name: str, sign: float = 1.0) -> Detector:
    return lambda run: _finite(sign * run.series[name])


def with_prior(detector: Detector) -> Detector:
    """Combine `detector` with koopmon's prior, as log-odds."""

    def score(run: Kept[Recipe]) -> Series:
        evidence = 4 * np.log(np.maximum(detector(run), 0.0) + LEAST_EVIDENCE)
        known = [risk.components.get("prior", 0.0) for risk in online(run)]
        return np.asarray(evidence + np.array(known))

    return score


DETECTORS: Mapping[str, Detector] = {
    "koopmon forecast": forecast,
    "koopmon forecast, loss logged": forecast_by_loss,
    "koopmon risk": online_risk,
    "unsteadiness": unsteadiness,
    "update ratio / start": _spectral("update_ratio"),
    "expansive mass / start": _spectral("expansive_mass"),
    "spectral radius / start": _spectral("spectral_radius"),
    "near-unit mass, fallen": _spectral("near_unit_mass", -1.0),
    "kappa(V) / start": _spectral("eigenvector_condition_number"),
    "loss z-score, with prior": with_prior(_profiled("loss", z_score)),
    "gradient norm, with prior": with_prior(_profiled("grad_norm", lambda values: values)),
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
