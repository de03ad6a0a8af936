"""KSS by projection: ceilings on the norms of the weights that write into the residual stream.

A block maps x to x + F(x), and F is linear in its last matrix. Scaling the writing weights by c turns an eigenvalue
1 + mu of one residual branch into 1 + c mu, without gradients and eigenvectors. At an alarm, each block whose spectral
radius rho exceeds tau gets ceilings ||W|| (tau - 1) / (rho - 1) on the norms of its writing weights. They hold at each
step until the run is calm. As over the wire, ceilings are in force DELAY steps after their snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.control import DELAY
from koopmon.config import PolicyConfig
from koopmon.spectral import SpectralProfile

WRITES = "project"
"""Name of the modules that write into the stream: the output of the attention and the second matrix of the MLP."""
SMALLEST, LARGEST = 0.5, 1.5
"""Bounds of the factor on a ceiling in one snapshot. Above 1, a ceiling rises again."""
CALM_STEPS = 50
"""Calm steps after which the ceilings end."""
WEIGHT = 0.1
"""Weight of the newest snapshot in the mean of the calm radii, as in the policy."""


@dataclass(frozen=True, slots=True)
class Tau:
    """Largest radius of a block under an alarm: `ratio` times its mean radius while calm, at least `least`.

    The ratio was chosen among 1 and 2 on seeds 0 and 1 of the two decoders at D 64.
    """

    ratio: float = 1.0
    least: float = 2.0

    def of(self, calm_radius: float | None) -> float:
        return max(self.least, self.ratio * calm_radius) if calm_radius is not None else self.least


def writing_weights(block: nn.Module) -> list[Tensor]:
    """Return the weights and the biases with which a block writes into the stream. Raises ValueError without any."""
    found = [
        parameter
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == WRITES
        for parameter in module.parameters(recurse=False)
    ]
    if not found:
        raise ValueError(f"{type(block).__name__}: no module named {WRITES}")
    return found


class Projection:
    """Ceilings of one training."""

    def __init__(self, blocks: Sequence[nn.Module], tau: Tau | None = None) -> None:
        self._weights = [writing_weights(block) for block in blocks]
        self._tau = tau or Tau()
        self._calm_radii: list[float | None] = [None] * len(blocks)
        self._ceilings: dict[int, list[float]] = {}
        self._waiting: list[tuple[int, dict[int, list[float]]]] = []
        self._calm_since: int | None = None
        self.is_active = False
        self.first_step: int | None = None
        """Step of the first alarm."""
        self.num_held = 0
        """Number of steps with ceilings."""

    def see(self, step: int, profile: SpectralProfile | None, risk: float, policy: PolicyConfig) -> None:
        """Note the calm radii of a snapshot, or set ceilings while an alarm lasts."""
        calm = risk < policy.release_risk
        self._calm_since = None if not calm else step if self._calm_since is None else self._calm_since
        if risk >= policy.act_risk:
            self.is_active = True
            self.first_step = step if self.first_step is None else self.first_step
        if self.is_active and self._calm_since is not None and step - self._calm_since >= CALM_STEPS:
            self.is_active = False
            self._waiting = [(step + DELAY, {})]
        if profile is None or not profile.informative:
            return
        radii = [layer.spectral_radius for layer in profile.layers]
        if self.is_active:
            self._waiting.append((step + DELAY, self._lowered(radii)))
        elif calm:
            self._calm_radii = [
                new if old is None else (1 - WEIGHT) * old + WEIGHT * new
                for old, new in zip(self._calm_radii, radii, strict=True)
            ]

    def _lowered(self, radii: Sequence[float]) -> dict[int, list[float]]:
        """Return the ceilings of the blocks above tau, and of those that have ceilings."""
        found = {}
        for layer, radius in enumerate(radii):
            tau = self._tau.of(self._calm_radii[layer])
            if not (radius > tau or layer in self._ceilings):
                continue
            factor = (tau - 1.0) / (radius - 1.0) if radius > 1.0 else math.inf
            factor = min(max(factor, SMALLEST), LARGEST)
            found[layer] = [float(weight.detach().norm()) * factor for weight in self._weights[layer]]
        return found

    @torch.no_grad()
    def hold(self, step: int) -> None:
        """Scale the weights above their ceilings, after the optimizer's update of `step`."""
        for at, latest in self._waiting:
            if at <= step:
                self._ceilings = latest
        self._waiting = [(at, latest) for at, latest in self._waiting if at > step]
        self.num_held += bool(self._ceilings)
        for layer, ceilings in self._ceilings.items():
            for weight, ceiling in zip(self._weights[layer], ceilings, strict=True):
                norm = float(weight.norm())
                if norm > ceiling:
                    weight.mul_(ceiling / norm)
