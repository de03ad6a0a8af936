"""Prunes configurations of an Optuna study by their initial risk: one forward pass, before anything is trained::

    from koopmon.integrations.optuna import prune_by_initial_risk

    def objective(trial):
        rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        model = make_model(trial)
        prune_by_initial_risk(trial, model, tokens, learning_rate=rate, calibrator="calibrator.json")
        return train(model, rate)

The decision uses the calibrated probability that the configuration diverges. Its inputs are learning rate x width x
depth, and the presence of normalised layers. Near-unit mass, the spectrum's own score, separates architectures but
barely predicts which learning rates diverge (docs/evidence.md). The score is recorded with each trial, and prunes only
if the user sets a bound for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from koopmon.errors import CalibrationError, ConfigError, MissingExtraError
from koopmon.profiling import capture_states
from koopmon.risk.calibration import Calibrator, Example, load
from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import profile_states

try:
    import optuna
except ModuleNotFoundError as error:
    if error.name != "optuna":
        raise
    raise MissingExtraError(__name__, "optuna", "optuna") from None

__all__ = ["InitialForecast", "forecast", "prune_by_initial_risk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialForecast:
    """Initial risk of a configuration before training. None is unknown; `reason` then explains it."""

    divergence_probability: float | None
    near_unit_mass: float | None
    """Mean over the layers."""
    reason: str = ""


def forecast(
    model: nn.Module,
    *batch: Any,
    learning_rate: float | None = None,
    calibrator: Calibrator | str | os.PathLike[str] | None = None,
    num_samples: int = 512,
    svd_rank: int | None = 32,
    **batch_kwargs: Any,
) -> InitialForecast:
    """Profile `model` with one forward pass `model(*batch, **batch_kwargs)`, in eval mode and without gradients.

    `learning_rate` is the peak of its schedule under Adam or a similar optimizer. `calibrator` is for this kind of
    model, as `koopmon calibrate` writes it, or the path of its file. For a rate above all rates of the fit, the
    probability is that of the highest fitted rate: a lower bound, by the form of the fit.

    Raises CalibrationError when the calibrator is unreadable or for another kind of model, and the exceptions of
    `koopmon.profile` for the model.
    """
    known = calibrator if calibrator is None or isinstance(calibrator, Calibrator) else load(Path(calibrator))
    captured = capture_states(model, *batch, num_samples=num_samples, **batch_kwargs)
    spectrum = profile_states(captured.states, svd_rank=svd_rank, paired=captured.paired)
    risk = initial_risk(spectrum, known_exponent=captured.known_exponent)
    adapter = captured.discovery.adapter.name
    probability, reason = None, ""
    if known is None or learning_rate is None:
        reason = "no calibrator"
    elif known.adapter != adapter:
        raise CalibrationError(f"calibrator is for {known.adapter}; this model's adapter is {adapter}")
    elif risk.update_exponent is None:
        reason = risk.reason
    else:
        width, num_layers = int(captured.states[0].shape[-1]), spectrum.num_layers
        rate = min(learning_rate, known.highest_effective_rate / (width * num_layers))
        exponent = risk.update_exponent
        example = Example(update_exponent=exponent, learning_rate=rate, width=width, num_layers=num_layers)
        probability = known.probability(example)
    return InitialForecast(divergence_probability=probability, near_unit_mass=risk.score, reason=reason)


def prune_by_initial_risk(
    trial: optuna.trial.Trial,
    model: nn.Module,
    *batch: Any,
    learning_rate: float | None = None,
    calibrator: Calibrator | str | os.PathLike[str] | None = None,
    max_probability: float = 0.5,
    max_near_unit_mass: float | None = None,
    **options: Any,
) -> InitialForecast:
    """Raise `optuna.TrialPruned` when the configuration is likely to diverge; otherwise return its forecast.

    With a calibrator and a learning rate, it prunes when the probability is above `max_probability`. With
    `max_near_unit_mass`, it prunes when the score is above that bound, which by itself is weak evidence. One of the two
    is required. The trial keeps both figures as user attributes `koopmon:divergence_probability` and
    `koopmon:near_unit_mass`. A configuration without figures is not pruned; `koopmon:reason` holds the reason.

    `options` are further arguments of `forecast`. Raises ConfigError for arguments that allow no decision or lie out of
    bounds, and the exceptions of `forecast`.
    """
    if (calibrator is None) != (learning_rate is None):
        raise ConfigError("calibrator and learning_rate go together: the probability depends on the rate")
    if calibrator is None and max_near_unit_mass is None:
        raise ConfigError("no criterion: give a calibrator and the learning_rate, or a max_near_unit_mass")
    if not 0.0 < max_probability < 1.0:
        raise ConfigError(f"max_probability = {max_probability}: allowed are numbers between 0 and 1")
    found = forecast(model, *batch, learning_rate=learning_rate, calibrator=calibrator, **options)
    for name in ("divergence_probability", "near_unit_mass"):
        if getattr(found, name) is not None:
            trial.set_user_attr(f"koopmon:{name}", getattr(found, name))
    probability, mass, reason, prune = found.divergence_probability, found.near_unit_mass, found.reason, True
    if probability is not None and probability > max_probability:
        reason = f"diverges with probability {probability:.2f}, more than {max_probability:g}"
    elif max_near_unit_mass is not None and mass is not None and mass > max_near_unit_mass:
        reason = f"near-unit mass {mass:.2f} is above {max_near_unit_mass:g}"
    else:
        prune = False
    if reason:
        trial.set_user_attr("koopmon:reason", reason)
    if prune:
        raise optuna.TrialPruned(reason)
    return found
