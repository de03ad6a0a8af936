"""Rows of a history: the records that a reader yields, and how they are built from the columns of the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from koopmon.history.plain_profile import PlainProfile, unpack
from koopmon.history.schema import PACKED, from_scalar, unpacked_layers
from koopmon.wire.messages import MEASURED, Applied, AtStep, Command, Hello, RunName, TrainingStep

Time = Annotated[float, Meta(ge=0.0, le=2.5e11)]
"""Unix seconds. The last years of datetime are beyond the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run with all its launches. Times are Unix seconds; `state` is a `koopmon.history.schema.RunState`."""

    name: RunName
    """Its allowed characters need no escapes in a page, a terminal or a file name."""
    first_seen: Time
    last_seen: Time
    state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview(RunRow):
    """One run with its counts and extremes over all launches. Steps are optimizer steps; None means unknown."""

    num_launches: int
    num_snapshots: int
    last_step: int | None
    max_risk: float | None
    loss: float | None
    """The last known loss."""
    lr_scale: float
    """LR scale at the last snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncarnationRow:
    """One launch of a run. Times are Unix seconds; `ended` is None while the launch runs."""

    run: RunName
    incarnation: str
    started: Time
    ended: Time | None
    end_reason: str | None
    hello: Hello | None
    applied: Applied | None


class ProfileHead(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot without its profile, which has almost all of the bytes. `id` is the number of its row."""

    id: int
    incarnation: str
    step: int
    time: Time
    num_shards: int
    masked: bool
    seconds: float
    non_finite: bool


class ProfileRow(ProfileHead, frozen=True, kw_only=True):
    """One snapshot. `profile` is None when the states were not finite."""

    profile: PlainProfile | None
    observables: dict[str, list[float | None]]
    """Measurements of the model family by name: one value per transition."""


class AssessmentRow(AtStep, msgspec.Struct, frozen=True, kw_only=True):
    """The risk of one snapshot with its reason and components."""

    incarnation: str
    training: TrainingStep
    time: Time
    informative: bool
    non_finite: bool
    risk: float
    reason: str
    components: dict[str, float | None]


class ObservationRow(AssessmentRow, frozen=True, kw_only=True):
    """One input of the detector with its assessment."""

    observation: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRow:
    """One command.

    `outcome` is "pending", "sent", "dry_run", "unanswered", or the outcome of its last ack, at step `acked_step`.
    """

    command: Command
    time: Time
    outcome: str
    acked_step: int | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """One decision of the policy with its commands."""

    incarnation: str
    step: int
    time: Time
    phase: str
    reason: str
    risk: float
    commands: tuple[CommandRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRow:
    """One value of a logged scalar with its band; None where it is not finite, or not known."""

    step: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRow(AtStep):
    """The scalars of one heartbeat; None means unknown."""

    incarnation: str
    process_rank: int
    time: Time
    training: TrainingStep
    step_seconds: float | None
    overhead_ratio: float
    logged: dict[str, LoggedRow]
    """Readings of the scalars that the user's loop logs, by name."""


class _Seen(msgspec.Struct):
    """The part of an observation that an assessment has."""

    informative: Any = False
    """Another type than a bool counts as False: replay names the step of such a row."""


_decode_seen = msgspec.json.Decoder(_Seen).decode
_decode_components = msgspec.json.Decoder(dict[str, float | None]).decode

R = TypeVar("R")
Row: TypeAlias = sqlite3.Row | Mapping[str, Any]


def profile_head(row: Row) -> ProfileHead:
    return row_of(row, ProfileHead, masked=bool(row["masked"]), non_finite=bool(row["non_finite"]))


def profile_row(row: Row, *, eigenvalues: bool = True) -> ProfileRow:
    head = profile_head(row)
    profile, observables = unpack(row["profile"], non_finite=head.non_finite, eigenvalues=eigenvalues)
    return ProfileRow(**msgspec.structs.asdict(head), profile=profile, observables=observables)


def assessment_row(row: Mapping[str, Any], kind: type[R], **values: Any) -> R:
    return row_of(
        row,
        kind,
        training=training_of(row),
        informative=_decode_seen(row["observation"]).informative is True,
        non_finite=bool(row["non_finite"]),
        components=_decode_components(row["components"]),
        **values,
    )


def observation_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input of the detector without the scalars of the training. Earlier versions kept all in JSON."""
    known = msgspec.json.decode(row["observation"], type=dict[str, Any])
    for name in PACKED:
        if (packed := row.get(name)) is not None:
            known[name] = unpacked_layers(name, packed)
    return known


def training_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known fields of the row's TrainingStep. A store of an earlier koopmon may lack some columns."""
    known = {name: value for name in TrainingStep.__struct_fields__ if (value := row.get(name)) is not None}
    if str in map(type, known.values()):  # NaN
        known |= {name: from_scalar(known[name]) for name in MEASURED if name in known}
    return known


def row_of(row: Row, kind: type[R], **values: Any) -> R:
    """Build a row of the columns that match its fields; `values` overrides columns that need conversion."""
    return msgspec.convert({**row, **values}, kind)
