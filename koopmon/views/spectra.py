"""Spectra of a run for the pictures, and its layers over its steps.

The profiles of a long run together do not fit into memory. Each is read once; three numbers per layer are kept of all,
eigenvalues only of a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koopmon.history.reader import ProfileRow

FIELDS = ("near_unit_mass", "expansive_mass", "spectral_radius")
WORDS = dict(zip(FIELDS, ("near-unit mass", "expansive mass", "spectral radius"), strict=True))
MAX_COLUMNS = 400
"""Maximum number of columns of a heatmap; above it, a column is the mean of adjacent snapshots."""
Place = tuple[str, int]
"""Incarnation and step of one snapshot."""
Layers = list[tuple[float | None, ...]]
"""Values of FIELDS for each layer of one snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSpectrum:
    """Eigenvalues of one snapshot: for each transition, pairs (Re, Im).

    Masses are means over layers; the radius is the largest.
    """

    name: str
    """"calm", "alarm" or "after"."""
    incarnation: str
    step: int
    risk: float | None
    near_unit_mass: float
    expansive_mass: float
    spectral_radius: float
    num_samples: int
    eigenvalues: tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Layer by step of one launch: `values[field][layer][column]`.

    `steps[column]` is the step of the first snapshot in a column.
    """

    incarnation: str
    steps: tuple[int, ...]
    num_snapshots: int
    values: dict[str, tuple[tuple[float | None, ...], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """Data kept from all profiles of a run."""

    spectra: tuple[RecordedSpectrum, ...]
    heatmap: Heatmap | None
    num_incomplete: int
    mean_seconds: float | None


def read_profiles(
    rows: Iterable[ProfileRow], risks: Mapping[Place, float], alarm: Place | None, senders: Mapping[str, int]
) -> Profiles:
    """Select the spectra and the heatmap of a run, from the launch of `alarm` if there is one, else from the last.

    `risks` holds the risk of each snapshot, `senders` the number of shards of a complete snapshot per launch.
    """
    columns: dict[str, list[tuple[int, Layers]]] = {}
    calm: tuple[float, ProfileRow] | None = None
    at_alarm: ProfileRow | None = None
    last: ProfileRow | None = None
    incomplete = 0
    seconds: list[float] = []
    for row in rows:
        seconds.append(row.seconds)
        incomplete += row.num_shards < senders.get(row.incarnation, 0)
        layers = [] if row.profile is None else row.profile.get("layers", [])
        if not layers:
            continue
        columns.setdefault(row.incarnation, []).append((row.step, [_numbers(layer) for layer in layers]))
        risk = risks.get((row.incarnation, row.step))
        before = alarm is None or (row.incarnation == alarm[0] and row.step < alarm[1])
        # The first snapshot of a launch has no predecessor, so its risk of 0 carries no information.
        started = len(columns[row.incarnation]) > 1
        if before and started and risk is not None and (calm is None or risk < calm[0]):
            calm = risk, row
        if alarm is not None and row.incarnation == alarm[0] and (at_alarm is None or row.step <= alarm[1]):
            at_alarm = row
        last = row
    chosen = (("calm", None if calm is None else calm[1]), ("alarm", at_alarm), ("after", last))
    shown: dict[Place, RecordedSpectrum] = {}
    for name, found in chosen:
        if found is not None:
            place = found.incarnation, found.step
            shown.setdefault(place, _spectrum(name, found, risks.get(place)))
    where = alarm[0] if alarm is not None else next(reversed(columns), "")
    return Profiles(
        spectra=tuple(shown.values()),
        heatmap=_heatmap(where, columns[where]) if where in columns else None,
        num_incomplete=incomplete,
        mean_seconds=math.fsum(seconds) / len(seconds) if seconds else None,
    )


def _numbers(layer: Mapping[str, Any]) -> tuple[float | None, ...]:
    return tuple(value if isinstance(value := layer.get(name), (int, float)) else None for name in FIELDS)


def _spectrum(name: str, row: ProfileRow, risk: float | None) -> RecordedSpectrum:
    assert row.profile is not None, "only rows with a profile are chosen"
    layers = row.profile["layers"]
    numbers = [[value for value in column if value is not None] for column in zip(*map(_numbers, layers), strict=True)]
    masses = [math.fsum(values) / len(values) if values else 0.0 for values in numbers]
    return RecordedSpectrum(
        name=name,
        incarnation=row.incarnation,
        step=row.step,
        risk=risk,
        near_unit_mass=masses[0],
        expansive_mass=masses[1],
        spectral_radius=max(numbers[2], default=0.0),
        num_samples=int(layers[0].get("num_samples", 0)),
        eigenvalues=tuple(
            tuple((float(real), float(imaginary)) for real, imaginary in layer.get("eigenvalues", []))
            for layer in layers
        ),
    )


def _heatmap(incarnation: str, columns: Sequence[tuple[int, Layers]]) -> Heatmap:
    columns = sorted(columns, key=lambda column: column[0])
    size = max(1, math.ceil(len(columns) / MAX_COLUMNS))
    groups = [columns[start : start + size] for start in range(0, len(columns), size)]
    depth = max(len(layers) for _, layers in columns)

    def cell(group: Sequence[tuple[int, Layers]], layer: int, field: int) -> float | None:
        values = [layers[layer][field] for _, layers in group if layer < len(layers)]
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known else None

    return Heatmap(
        incarnation=incarnation,
        steps=tuple(group[0][0] for group in groups),
        num_snapshots=len(columns),
        values={
            name: tuple(tuple(cell(group, layer, field) for group in groups) for layer in range(depth))
            for field, name in enumerate(FIELDS)
        },
    )
