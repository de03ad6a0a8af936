"""Calibrated risk: the probability that a run diverges, from its spectrum at the start and its learning rate.

The learning rate alone is blind to the architecture, and near-unit mass alone to the learning rate. What told best
which models a high rate kills is whether anything brakes their updates (`koopmon.risk.normalization`). Of the size,
fits of our sweep with a weight for each gave rate, width and depth nearly the same: what counts is the effective rate,
learning rate x width x depth. (A step of Adam moves each weight by the rate, so that a layer's output moves by the rate
times its width, and a stack's by that times its depth.) docs/evidence.md has the figures and says what was chosen on
which runs. A logistic model joins the two:

    P(diverges) = sigmoid(b + w_1 z_1 + w_2 z_2),    z the standardised features

with w_1, of the effective rate, never negative: a higher rate never lowers the probability, so that "how high may the
rate be?" has an answer. A calibrator belongs to the family of models that it was fitted on, whatever the rank and the
number of tokens of their profiles, since neither feature knows of them; and to optimizers whose steps are as long as
the rate says, whatever the gradient: Adam and its kin.
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
PENALTY = 1e-2
"""Of the squared weights, in units of one run's log-likelihood: keeps them finite where the runs are separable."""
MIN_RUNS = 20
NUM_BINS = 10
LEARNING_RATES = (1e-7, 1.0)
"""Where `max_learning_rate` looks."""

Finite = Annotated[float, Meta(ge=-1e9, le=1e9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One run. `update_exponent` is the mean over layers at the start; `learning_rate` the peak of its schedule."""

    update_exponent: float
    learning_rate: float
    width: int
    num_layers: int
    diverged: bool = False

    def features(self) -> tuple[float, ...]:
        """As named by FEATURES."""
        return math.log10(self.effective_rate), normalization_from_exponent(self.update_exponent)

    @property
    def effective_rate(self) -> float:
        return self.learning_rate * self.width * self.num_layers


FEATURES = ("log10_effective_rate", "brake")


class Calibrator(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fitted model, and where it comes from. `means` and `scales` standardise the features."""

    version: Annotated[int, Meta(ge=1)] = FORMAT_VERSION
    adapter: str
    features: tuple[str, ...] = FEATURES
    weights: tuple[Finite, ...]
    intercept: Finite
    means: tuple[Finite, ...]
    scales: tuple[Annotated[float, Meta(ge=1e-9, le=1e9)], ...]
    highest_effective_rate: Annotated[float, Meta(ge=1e-30, le=1e30)]
    """Of the runs that it was fitted on: beyond it nothing is known."""
    num_runs: int
    num_diverged: int
    held_out_error: float | None = None
    """Expected calibration error on configurations that were held out of the fit."""
    provenance: dict[str, str | int | float | None] = {}

    def covers(self, example: Example) -> bool:
        """Whether a rate as high as this run's was tried. A lower one than any that was is safer, by the fit's form."""
        return example.effective_rate <= self.highest_effective_rate

    def logit(self, example: Example) -> float:
        rows = zip(example.features(), self.means, self.scales, self.weights, strict=True)
        return self.intercept + sum(weight * (value - mean) / scale for value, mean, scale, weight in rows)

    def probability(self, example: Example) -> float:
        """That this run diverges, in (0, 1)."""
        return 1.0 / (1.0 + math.exp(-min(max(self.logit(example), -36.0), 36.0)))

    def max_learning_rate(self, example: Example, probability: float) -> float | None:
        """The highest rate in LEARNING_RATES at which this model diverges with at most `probability`; None: none.

        Never higher, in effect, than what was tried.
        """
        if not 0.0 < probability < 1.0:
            raise CalibrationError(f"probability {probability} must lie between 0 and 1")
        slope = self.weights[0] / self.scales[0]
        at_one = self.logit(_at(example, 1.0))
        wanted = math.log(probability / (1.0 - probability))
        low, high = map(math.log10, LEARNING_RATES)
        high = min(high, math.log10(self.highest_effective_rate / (example.width * example.num_layers)))
        if slope <= 0.0:
            return 10.0**high if at_one <= wanted else None
        found = (wanted - at_one) / slope
        return None if found < low else 10.0 ** min(found, high)


def _at(example: Example, learning_rate: float) -> Example:
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
    """The maximum of the penalised likelihood, by Newton's method, in float64.

    Raises CalibrationError for fewer than 20 runs, or when all of them ended alike.
    """
    diverged = [example.diverged for example in examples]
    if len(examples) < MIN_RUNS or all(diverged) or not any(diverged):
        raise CalibrationError(
            f"{len(examples)} runs, {sum(diverged)} of them diverged: at least {MIN_RUNS} are needed, some of each kind"
        )
    x = torch.tensor([example.features() for example in examples], dtype=torch.float64)
    y = torch.tensor(diverged, dtype=torch.float64)
    means, scales = x.mean(0), x.std(0)
    scales = torch.where(scales > 1e-9, scales, torch.ones_like(scales))
    z = (x - means) / scales
    weights = _newton(z, y)
    if weights[0] < 0:  # more rate, less risk: noise, not physics
        weights = torch.cat([torch.zeros(1, dtype=z.dtype), _newton(z[:, 1:], y)])
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
    """Weights and, last, the intercept, which alone is not penalised. Damped, so that separable runs converge too."""
    design = torch.cat([z, torch.ones_like(y)[:, None]], dim=1)
    penalty = torch.full((design.shape[1],), PENALTY, dtype=z.dtype)
    penalty[-1] = 1e-9
    weights = torch.zeros(design.shape[1], dtype=z.dtype)

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(design @ w, y, reduction="sum") + (
            0.5 * (penalty * w.square()).sum()
        )

    for _ in range(100):
        p = torch.sigmoid(design @ weights)
        gradient = design.T @ (p - y) + penalty * weights
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + torch.diag(penalty)
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if gradient.abs().max() < 1e-9:
            break
    return weights


def held_out(examples: Sequence[Example], groups: Sequence[Hashable] | None = None) -> list[float]:
    """The probability of each run by a model that saw no run of its group.

    By default a group is a width and depth, or, where all runs share one, a tenth of the runs. Raises CalibrationError
    as `fit` does.
    """
    if groups is None:
        sizes = [(example.width, example.num_layers) for example in examples]
        groups = sizes if len(set(sizes)) > 1 else [index % 10 for index in range(len(examples))]
    found = [0.0] * len(examples)
    for group in set(groups):
        model = fit([example for example, other in zip(examples, groups, strict=True) if other != group])
        for index, example in enumerate(examples):
            if groups[index] == group:
                found[index] = model.probability(example)
    return found


def calibration_error(diverged: Sequence[bool], probabilities: Sequence[float]) -> float:
    """Expected calibration error: over ten bins of equal width, the mean gap between what was said and what came."""
    gaps = (abs(said - came) * count for said, came, count in reliability(diverged, probabilities))
    return sum(gaps) / len(diverged)


def reliability(diverged: Sequence[bool], probabilities: Sequence[float]) -> list[tuple[float, float, int]]:
    """Of each bin that is not empty: the mean probability, the share that diverged, and the number of runs."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for ended, probability in zip(diverged, probabilities, strict=True):
        bins.setdefault(min(int(probability * NUM_BINS), NUM_BINS - 1), []).append((probability, ended))
    return [
        (sum(p for p, _ in rows) / len(rows), sum(ended for _, ended in rows) / len(rows), len(rows))
        for _, rows in sorted(bins.items())
    ]


def save(calibrator: Calibrator, path: Path) -> None:
    """Write `calibrator` as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibrator), indent=2) + b"\n")


def load(path: Path) -> Calibrator:
    """Read a calibrator. Raises CalibrationError naming the file and what is wrong with it."""
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
            f"calibrator {path}: version {found.version}, this koopmon reads version {FORMAT_VERSION}; fit it anew"
        )
    if found.features != FEATURES or not len(FEATURES) == len(found.weights) == len(found.means) == len(found.scales):
        raise CalibrationError(
            f"calibrator {path}: features {one_line(', '.join(found.features), 80)}; allowed are {FEATURES}"
        )
    return found
