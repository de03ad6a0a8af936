"""Spectra of a run and its layers over steps, from live profiles and from recorded ones.

The profiles of a long run together do not fit into memory. A report selects some hundreds; it keeps four numbers per
layer of them, and eigenvalues only of a few.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koopmon.history.plain_profile import PlainProfile
from koopmon.history.rows import ProfileHead, ProfileRow
from koopmon.telemetry.metrics import layer_buckets

QUANTITIES: Mapping[str, str] = {
    "near_unit_mass": "near-unit mass",
    "expansive_mass": "expansive mass",
    "contractive_mass": "contractive mass",
    "spectral_radius": "spectral radius",
}
"""Quantities of the heatmap and their display names."""
MAX_COLUMNS = 400
"""Maximum number of columns of a report's heatmap; above it, each is the snapshot of the highest risk of adjacent ones.
"""
Place = tuple[str, int]
"""Incarnation and step of one snapshot."""


@dataclass(frozen=True, slots=True)
class Column:
    """One step of the heatmap: for each quantity, one value per row. NaN is unknown."""

    step: int
    values: Mapping[str, array[float]]

    @classmethod
    def of(cls, step: int, profile: PlainProfile, *, share: bool = True) -> Column:
        """Build the column of a profile. With `share`, layers share rows as they share series in the metrics."""
        spans = [span for _, span in _rows(profile.num_layers, share=share)]
        values = {}
        for name in QUANTITIES:
            reduce = max if name == "spectral_radius" else _mean
            numbers = [math.nan if value is None else value for value in profile.columns[name]]
            if len(spans) < len(numbers):
                numbers = [reduce(numbers[span.start : span.stop]) for span in spans]
            values[name] = array("f", numbers)
        return cls(step, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """The eigenvalues of one profile: for each row a flat array of pairs (re, im).

    A row that layers share has the eigenvalues of its first layer.
    """

    step: int
    labels: tuple[str, ...]
    eigenvalues: tuple[array[float], ...]
    num_samples: int
    informative: bool
    reason: str

    @classmethod
    def of(cls, step: int, profile: PlainProfile, *, share: bool = True) -> Spectrum:
        rows = _rows(profile.num_layers, share=share)
        return cls(
            step=step,
            labels=tuple(label for label, _ in rows),
            eigenvalues=tuple(profile.eigenvalues[span.start] for _, span in rows),
            num_samples=profile.num_samples,
            informative=profile.is_informative,
            reason=profile.reason,
        )

    def pairs(self, row: int) -> list[tuple[float, float]]:
        """Eigenvalues of one row as (re, im)."""
        flat = self.eigenvalues[row]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def moduli(self) -> list[float]:
        """Moduli of the eigenvalues of all rows."""
        return [math.hypot(re, im) for row in range(len(self.labels)) for re, im in self.pairs(row)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "step": self.step,
            "layers": self.labels,
            "eigenvalues": [self.pairs(row) for row in range(len(self.labels))],
            "num_samples": self.num_samples,
            "informative": self.informative,
            "reason": self.reason,
        }


def mean_over_layers(column: Column, name: str) -> float:
    """Mean of a quantity over layers; of the spectral radius the largest value. NaN if no value is known."""
    if name == "spectral_radius":
        return max((value for value in column.values[name] if not math.isnan(value)), default=math.nan)
    return _mean(column.values[name])


def layers_to_dict(columns: Sequence[Column]) -> dict[str, Any]:
    """Plain values for JSON: the steps, and for each quantity a list by step of lists by layer."""
    names = columns[-1].values if columns else ()
    return {
        "steps": [column.step for column in columns],
        **{name: [column.values[name].tolist() for column in columns] for name in names},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSpectrum:
    """One of the spectra of a report. `name` is "calm", "alarm" or "after"; `column` has the values of its layers."""

    name: str
    incarnation: str
    risk: float | None
    spectrum: Spectrum
    column: Column

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: masses are means over layers, the radius is the largest."""
        means = {name: mean_over_layers(self.column, name) for name in QUANTITIES}
        place = {"name": self.name, "incarnation": self.incarnation, "risk": self.risk}
        return place | means | self.spectrum.to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """Data kept from all profiles of a run. `columns` are those of one launch."""

    spectra: tuple[ChosenSpectrum, ...] = ()
    incarnation: str = ""
    columns: tuple[Column, ...] = ()
    num_snapshots: int = 0
    """Number of snapshots in `columns`."""
    num_incomplete: int = 0
    """Number of snapshots profiled without the shards of some ranks."""
    mean_seconds: float | None = None


def read_profiles(
    heads: Iterable[ProfileHead],
    load: Callable[[Sequence[int]], Iterable[ProfileRow]],
    risks: Mapping[Place, float],
    alarm: Place | None,
    senders: Mapping[str, int],
) -> Profiles:
    """Select the spectra and the columns of a run, from the launch of `alarm` if there is one, else from the last.

    `load` reads the selected profiles by their ids: to decode all of a long run takes most of the time of a report.
    `risks` holds the risk of each snapshot, `senders` the number of shards of a complete snapshot per launch. Raises
    LookupError, TypeError, ValueError, AttributeError or OverflowError for a forged profile.
    """
    finite: dict[str, list[ProfileHead]] = {}
    chosen: dict[str, ProfileHead] = {}
    incomplete, seconds = 0, []
    for head in heads:
        seconds.append(head.seconds)
        incomplete += head.num_shards < senders.get(head.incarnation, 0)
        if head.non_finite:
            continue
        # The first snapshot of a launch has no predecessor, so its risk of 0 carries no information.
        started = head.incarnation in finite
        finite.setdefault(head.incarnation, []).append(head)
        place = head.incarnation, head.step
        early = alarm is None or (head.incarnation == alarm[0] and head.step < alarm[1])
        if started and early and place in risks and risks[place] < _risk(chosen.get("calm"), risks):
            chosen["calm"] = head
        if alarm is not None and head.incarnation == alarm[0] and ("alarm" not in chosen or head.step <= alarm[1]):
            chosen["alarm"] = head
        chosen["after"] = head
    launch = alarm[0] if alarm is not None else next(reversed(finite), "")
    kept = sorted(finite.get(launch, ()), key=lambda head: head.step)
    names: dict[int, str] = {}
    for name in ("calm", "alarm", "after"):
        if name in chosen:
            names.setdefault(chosen[name].id, name)
    shown = {head.id for head in _thinned(kept, risks)}
    columns: list[Column] = []
    spectra: dict[str, ChosenSpectrum] = {}
    for row in load(sorted(shown | set(names))):
        if row.profile is None:
            continue
        column = Column.of(row.step, row.profile, share=False)
        if row.id in shown:
            columns.append(column)
        if (found := names.get(row.id)) is not None:
            spectra[found] = ChosenSpectrum(
                name=found,
                incarnation=row.incarnation,
                risk=risks.get((row.incarnation, row.step)),
                spectrum=Spectrum.of(row.step, row.profile, share=False),
                column=column,
            )
    return Profiles(
        spectra=tuple(spectra[name] for name in names.values() if name in spectra),
        incarnation=launch,
        columns=tuple(sorted(columns, key=lambda column: column.step)),
        num_snapshots=len(kept),
        num_incomplete=incomplete,
        mean_seconds=_mean(seconds) if seconds else None,
    )


def _risk(head: ProfileHead | None, risks: Mapping[Place, float]) -> float:
    return math.inf if head is None else risks[head.incarnation, head.step]


def _thinned(heads: Sequence[ProfileHead], risks: Mapping[Place, float]) -> list[ProfileHead]:
    """Select at most MAX_COLUMNS snapshots: of adjacent ones the first of the highest risk."""
    size = max(1, math.ceil(len(heads) / MAX_COLUMNS))
    groups = (heads[start : start + size] for start in range(0, len(heads), size))
    return [max(group, key=lambda head: risks.get((head.incarnation, head.step), 0.0)) for group in groups]


def _rows(num_layers: int, *, share: bool) -> Sequence[tuple[str, range]]:
    """Label and layers of each row."""
    return (
        layer_buckets(num_layers) if share else [(str(layer), range(layer, layer + 1)) for layer in range(num_layers)]
    )


def _mean(values: Sequence[float]) -> float:
    """Mean of the known values; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
