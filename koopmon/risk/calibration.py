"""Calibrated risk: the probability that a run diverges, from its update exponent at the start and its learning rate.

A logistic model joins two standardised features z_1 and z_2 (docs/method.md, "Risk at initialisation"):

    P(diverges) = sigmoid(b + w_1 z_1 + w_2 z_2),    w_1 >= 0

- z_1 is the logarithm of the effective rate, learning rate x width x depth. Adam moves each weight by about the rate
  per step. The output of a layer then moves by rate x width, and that of a stack by rate x width x depth. Fits with
  a weight for each of the three gave nearly equal weights.
- z_2 is the normalisation strength (`koopmon.risk.normalization`). Near-unit mass does not depend on the learning rate.

w_1 >= 0 makes the probability monotonic in the rate, so a largest acceptable rate exists. A calibrator is valid for the
family of models of its runs. The optimizer's step length must not depend on the gradient's size, as with Adam.
The rank and the number of tokens of the profiles enter neither feature. docs/evidence.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta, Struct
from torch import Tensor

from koopmon.config import read_file
from koopmon.errors import CalibrationError, ConfigError, one_line
from koopmon.risk.normalization import normalization_from_exponent

FORMAT_VERSION = 3
"""Version of the calibrator file. `load` refuses every other one."""
PENALTY = 1e-2
"""Weight of the squared weights, in units of one run's log-likelihood. Chosen by hand.

It keeps the weights finite where the runs are separable.
"""
MIN_RUNS = 20
"""Smallest number of runs of a fit. Chosen by hand."""
NUM_BINS = 10
"""Number of bins of equal width of the reliability diagram. Chosen by hand."""
SHIPPED = Path(__file__).with_name("calibrator.json")
"""Calibrator of koopmon, for transformers: the result of `benchmarks.norms`."""
LEARNING_RATES = (1e-7, 1.0)
"""Bounds of the result of `max_learning_rate`. Chosen by hand."""

Finite = Annotated[float, Meta(ge=-1e9, le=1e9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Features and outcome of one run."""

    update_exponent: float
    """Update exponent of the stack at the start (`koopmon.spectral.stack_exponent`)."""
    learning_rate: float
    """Peak of the schedule, positive."""
    width: int
    """Width of the residual stream, at least 1."""
    num_layers: int
    """Number of transitions, at least 1."""
    diverged: bool = False
    """True where the run diverged; unused for a prediction."""

    def features(self) -> tuple[float, ...]:
        """Compute the features in the order of FEATURES."""
        return math.log10(self.effective_rate), normalization_from_exponent(self.update_exponent)

    @property
    def effective_rate(self) -> float:
        """Learning rate x width x number of layers."""
        return self.learning_rate * self.width * self.num_layers


FEATURES = ("log10_effective_rate", "brake")
"""Names of the features in a calibrator file. "brake" is the normalisation strength under its name in version 3."""


class Calibrator(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fitted logistic model and its provenance. `means` and `scales` standardise the features."""

    version: Annotated[int, Meta(ge=1)] = FORMAT_VERSION
    adapter: str
    features: tuple[str, ...] = FEATURES
    weights: tuple[Finite, ...]
    intercept: Finite
    means: tuple[Finite, ...]
    scales: tuple[Annotated[float, Meta(ge=1e-9, le=1e9)], ...]
    highest_effective_rate: Annotated[float, Meta(ge=1e-30, le=1e30)]
    """Largest effective rate of the runs of the fit. The model is not valid above it."""
    num_runs: int
    num_diverged: int
    held_out_error: float | None = None
    """Expected calibration error on held-out configurations, in [0, 1]; None where it was not computed."""
    provenance: dict[str, str | int | float | None] = {}

    def covers(self, example: Example) -> bool:
        """Return True when the effective rate is at most the highest one of the fit.

        Rates below the lowest one of the fit count as covered, because the probability never falls with the rate.
        """
        return example.effective_rate <= self.highest_effective_rate

    def logit(self, example: Example) -> float:
        """Compute the log-odds of divergence."""
        rows = zip(example.features(), self.means, self.scales, self.weights, strict=True)
        return self.intercept + sum(weight * (value - mean) / scale for value, mean, scale, weight in rows)

    def probability(self, example: Example) -> float:
        """Compute the probability of divergence, in (0, 1)."""
        # 36 is the largest integer for which the result stays below 1 in float64.
        return 1.0 / (1.0 + math.exp(-min(max(self.logit(example), -36.0), 36.0)))

    def max_learning_rate(self, example: Example, probability: float) -> float | None:
        """Compute the highest learning rate with at most the given probability of divergence.

        Args:
            example: the run; its own learning rate is not used.
            probability: in (0, 1), both excluded.

        Returns:
            A rate within LEARNING_RATES whose effective rate is at most the highest one of the fit; None when no such
            rate exists.

        Raises:
            CalibrationError: `probability` is out of bounds.
        """
        # The logit is linear in log10(rate) with this slope, and log10(1) = 0. So the solution of
        # at_one + slope * log10(rate) = wanted needs no search.
        if not 0.0 < probability < 1.0:
            raise CalibrationError(f"probability {probability} must lie between 0 and 1")
        slope = self.weights[0] / self.scales[0]
        at_one = self.logit(_at(example, 1.0))
        wanted = math.log(probability / (1.0 - probability))
        low, high = map(math.log10, LEARNING_RATES)
        high = min(high, math.log10(self.highest_effective_rate / (example.width * example.num_layers)))
        # Without a slope all rates have one probability.
        if slope <= 0.0:
            return 10.0**high if at_one <= wanted else None
        found = (wanted - at_one) / slope
        return None if found < low else 10.0 ** min(found, high)


def _at(example: Example, learning_rate: float) -> Example:
    """Copy the features of a run with another learning rate."""
    return Example(
        update_exponent=example.update_exponent,
        learning_rate=learning_rate,
        width=example.width,
        num_layers=example.num_layers,
    )


def fit(
    examples: Sequence[Example],
    *,
    adapter: str = "transformer",
    held_out_error: float | None = None,
    provenance: dict[str, str | int | float | None] | None = None,
) -> Calibrator:
    """Fit a calibrator by penalised maximum likelihood, with Newton's method in float64.

    Args:
        examples: the runs, at least MIN_RUNS; some diverged and some did not.
        adapter: name of the adapter of their models.
        held_out_error: expected calibration error to record, in [0, 1].
        provenance: details of the runs to record.

    Raises:
        CalibrationError: there are too few runs, or all of them have one outcome.
    """
    diverged = [example.diverged for example in examples]
    if len(examples) < MIN_RUNS or all(diverged) or not any(diverged):
        raise CalibrationError(
            f"{len(examples)} runs, {sum(diverged)} of them diverged: at least {MIN_RUNS} are needed, some of each kind"
        )
    x = torch.tensor([example.features() for example in examples], dtype=torch.float64, device="cpu")
    y = torch.tensor(diverged, dtype=torch.float64, device="cpu")
    means, scales = x.mean(0), x.std(0)
    # A constant feature has no scale. Its standardised values are then 0, and the penalty sets its weight to 0.
    scales = torch.where(scales > 1e-9, scales, torch.ones_like(scales))
    z = (x - means) / scales
    weights = _newton(z, y)
    # A negative weight of the rate comes from noise in the runs. The likelihood is concave, so the optimum under
    # w_1 >= 0 then lies at w_1 = 0.
    if weights[0] < 0:
        weights = torch.cat([torch.zeros(1, dtype=z.dtype, device="cpu"), _newton(z[:, 1:], y)])
    return Calibrator(
        adapter=adapter,
        weights=tuple(weights[:-1].tolist()),
        intercept=float(weights[-1]),
        means=tuple(means.tolist()),
        scales=tuple(scales.tolist()),
        highest_effective_rate=max(example.effective_rate for example in examples),
        num_runs=len(examples),
        num_diverged=sum(diverged),
        held_out_error=held_out_error,
        provenance=provenance or {},
    )


def _newton(z: Tensor, y: Tensor) -> Tensor:
    """Maximise the penalised likelihood by damped Newton steps.

    Args:
        z: (N, F), float64: standardised features.
        y: (N,), float64: 1 for runs that diverged, else 0.

    Returns:
        (F + 1,): the weights, then the intercept.
    """
    design = torch.cat([z, torch.ones_like(y)[:, None]], dim=1)
    penalty = torch.full((design.shape[1],), PENALTY, dtype=z.dtype, device="cpu")
    # The intercept has no penalty of weight, so the mean probability fits the share of diverged runs. The rest of 1e-9
    # keeps the curvature invertible.
    penalty[-1] = 1e-9
    weights = torch.zeros(design.shape[1], dtype=z.dtype, device="cpu")
    # 1000 steps and a gradient of 1e-9 bound the iteration. Chosen by hand.
    for _ in range(1000):
        p = torch.sigmoid(design @ weights)
        gradient = design.T @ (p - y) + penalty * weights
        if gradient.abs().max() < 1e-9:
            break
        # The Hessian X^T diag(p (1 - p)) X + penalty is positive definite, so every Newton step is a descent direction.
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + torch.diag(penalty)
        step = torch.linalg.solve(curvature, gradient)
        # A full step can overshoot where p is near 0 or 1 and the curvature is small. After a share t of the step the
        # curvature along it is at most exp(t d) times that of the start, with d the largest change of a run's log-odds.
        # The loss therefore falls up to t = log(1 + d) / d (Sun and Tran-Dinh, arXiv 1703.04599, section 4).
        change = (design @ step).abs().max()
        weights = weights - step * (torch.log1p(change) / change)
    return weights


def held_out(examples: Sequence[Example], groups: Sequence[Hashable] | None = None) -> list[float]:
    """Predict each run by a model that was fitted without the run's group.

    Args:
        examples: the runs.
        groups: a group for each run. By default runs of equal width and depth form a group; where all are equal, the
            runs form ten groups.

    Returns:
        The probability of divergence of each run.

    Raises:
        CalibrationError: `fit` cannot use the remaining runs of a group.
    """
    if groups is None:
        sizes = [(example.width, example.num_layers) for example in examples]
        groups = sizes if len(set(sizes)) > 1 else [index % 10 for index in range(len(examples))]
    models = {
        group: fit([example for example, other in zip(examples, groups, strict=True) if other != group])
        for group in set(groups)
    }
    return [models[group].probability(example) for example, group in zip(examples, groups, strict=True)]


def calibration_error(diverged: Sequence[bool], probabilities: Sequence[float]) -> float:
    """Compute the expected calibration error, in [0, 1].

    It is the mean gap between the predicted and the observed share of diverged runs. The mean is over the bins of
    `reliability`, with the number of runs as the weight.
    """
    gaps = (abs(said - came) * count for said, came, count in reliability(diverged, probabilities))
    return sum(gaps) / len(diverged)


def reliability(diverged: Sequence[bool], probabilities: Sequence[float]) -> list[tuple[float, float, int]]:
    """Compute the reliability diagram over NUM_BINS bins of equal width.

    Returns:
        The mean probability, the share of diverged runs and the number of runs, for each bin that holds a run.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for ended, probability in zip(diverged, probabilities, strict=True):
        bins.setdefault(min(int(probability * NUM_BINS), NUM_BINS - 1), []).append((probability, ended))
    return [
        (sum(p for p, _ in rows) / len(rows), sum(ended for _, ended in rows) / len(rows), len(rows))
        for _, rows in sorted(bins.items())
    ]


def save(calibrator: Calibrator, path: Path) -> None:
    """Write `calibrator` as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibrator)) + b"\n")


def load(path: Path) -> Calibrator:
    """Read a calibrator from a JSON file.

    Raises:
        CalibrationError: the file cannot be read, or its content is not allowed; the message holds the path.
    """
    try:
        raw = read_file(path)
    except OSError as error:
        raise CalibrationError(f"calibrator {path}: {error.strerror}") from None
    except ConfigError as error:
        raise CalibrationError(f"calibrator {error}") from None
    try:
        found = msgspec.json.decode(raw, type=Calibrator)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CalibrationError(f"calibrator {path}: {one_line(error)}") from None
    if found.version != FORMAT_VERSION:
        raise CalibrationError(
            f"calibrator {path}: version {found.version}, this koopmon reads version {FORMAT_VERSION}; fit it again"
        )
    if found.features != FEATURES or not len(FEATURES) == len(found.weights) == len(found.means) == len(found.scales):
        raise CalibrationError(
            f"calibrator {path}: features {one_line(', '.join(found.features), 80)}; allowed are {FEATURES}"
        )
    return found
