"""Frozen records of a run for the live page, safe to read while the monitor runs."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from koopmon.config import KssConfig, PolicyConfig
from koopmon.policy import PolicyState
from koopmon.risk.online_detector import Observation, OnlineRisk
from koopmon.telemetry.metrics import layer_buckets
from koopmon.wire.messages import AtStep, Command, TrainingStep

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

QUANTITIES: Mapping[str, str] = {
    "near_unit_mass": "near-unit mass",
    "expansive_mass": "expansive mass",
    "contractive_mass": "contractive mass",
    "spectral_radius": "spectral radius",
}
"""Quantities of the heatmap and their display names."""
SCALARS: Mapping[str, str] = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "lr_scale": "Rate scale",
    "kss_alpha": "KSS alpha",
}
"""Fields of `TrainingStep` in the tables of the live page and the report, and their display names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelinePoint(AtStep):
    """One snapshot with its assessment. `time` is Unix seconds."""

    training: TrainingStep
    time: float
    risk: float
    forecast: float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One step of the heatmap: for each quantity, one value per row (`LatestSpectrum.labels`)."""

    step: int
    values: Mapping[str, array[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatestSpectrum:
    """The eigenvalues of the latest profile, as flat pairs (re, im).

    Above MAX_LAYERS, layers share rows as they share series; a shared row has the eigenvalues of its first layer.
    """

    step: int
    labels: tuple[str, ...]
    eigenvalues: tuple[array[float], ...]
    informative: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandView:
    """One command: `outcome` as in the history, `step` is the step of its ack."""

    command: Command
    outcome: str
    step: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """One decision of the policy with the outcomes of its commands."""

    step: int
    time: float
    phase: str
    reason: str
    risk: float
    orders: tuple[CommandView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHealth:
    """Health of the agents. `dropped` counts snapshots by reason, including those lost inside the monitor."""

    num_ranks: int = 0
    world_size: int = 0
    overhead_ratio: float | None = None
    step_seconds: float | None = None
    taps_missing: int = 0
    control_ready: bool = True
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """State of detector and policy after the last snapshot, the input of `preview`. `now` is on the policy's clock."""

    now: float
    state: PolicyState
    observation: Observation
    risk: OnlineRisk
    policy: PolicyConfig
    kss: KssConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Data of one run's page at one moment. Times are Unix seconds.

    `state` is "running", "ended", "vanished", or "recorded" for a run known only from the history. `revision` grows
    with every change of any run.
    """

    name: str
    incarnation: str
    revision: int = 0
    state: str = "recorded"
    adapter: str = ""
    width: int = 0
    num_layers: int = 0
    acts: bool = False
    sends: bool = False
    hostname: str = ""
    step: int = 0
    last_heard: float = 0.0
    lr_scale: float = 1.0
    kss_alpha: float = 0.0
    num_received: int = 0
    health: AgentHealth = field(default_factory=AgentHealth)
    points: tuple[TimelinePoint, ...] = ()
    columns: tuple[Column, ...] = ()
    spectrum: LatestSpectrum | None = None
    decisions: tuple[DecisionView, ...] = ()
    standing: PolicyStatus | None = None

    @property
    def latest(self) -> TimelinePoint | None:
        return self.points[-1] if self.points else None


def plain(point: AtStep) -> dict[str, Any]:
    """Convert a point to plain values for JSON, with the scalars of its TrainingStep beside its own."""
    values = msgspec.to_builtins(point)
    return {**values.pop("training"), **values}


def column_of(step: int, profile: SpectralProfile) -> Column:
    """Heatmap column of a profile: one value per row."""
    return _column(step, {name: [getattr(layer, name) for layer in profile.layers] for name in QUANTITIES})


def recorded_column(step: int, profile: Mapping[str, Any]) -> Column:
    """Heatmap column of a `SpectralProfile.to_dict` without tensors. Raises KeyError, TypeError or ValueError."""
    return _column(step, {name: [float(layer[name]) for layer in profile["layers"]] for name in QUANTITIES})


def spectrum_of(step: int, profile: SpectralProfile) -> LatestSpectrum:
    """Eigenvalues of a profile."""
    pairs = [[(value.real, value.imag) for value in layer.eigenvalues.tolist()] for layer in profile.layers]
    return _spectrum(step, pairs, informative=profile.informative, reason=profile.reason)


def recorded_spectrum(step: int, profile: Mapping[str, Any]) -> LatestSpectrum:
    """Eigenvalues of a `SpectralProfile.to_dict`. Raises KeyError, TypeError or ValueError."""
    layers = profile["layers"]
    pairs = [[(float(re), float(im)) for re, im in layer["eigenvalues"]] for layer in layers]
    return _spectrum(step, pairs, informative=bool(profile["informative"]), reason=str(profile["reason"]))


def _spectrum(
    step: int, layers: Sequence[Sequence[tuple[float, float]]], *, informative: bool, reason: str
) -> LatestSpectrum:
    buckets = layer_buckets(len(layers))
    return LatestSpectrum(
        step=step,
        labels=tuple(label for label, _ in buckets),
        eigenvalues=tuple(array("f", chain.from_iterable(layers[span.start])) for _, span in buckets),
        informative=informative,
        reason=reason,
    )


def _column(step: int, layers: Mapping[str, list[float]]) -> Column:
    found = {}
    for name, values in layers.items():
        spans = [span for _, span in layer_buckets(len(values))]
        reduce = max if name == "spectral_radius" else _mean
        found[name] = array("f", [reduce(values[span.start : span.stop]) for span in spans])
    return Column(step, found)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
