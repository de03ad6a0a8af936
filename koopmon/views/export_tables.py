"""Tables of a recorded run for `koopmon export`: columns with their kinds and descriptions, and rows one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HistoryReader
from koopmon.views.run_view import DecisionView, TimelinePoint
from koopmon.wire.messages import TrainingStep

Kind = Literal["text", "integer", "number", "flag"]
Row = Sequence[str | int | float | bool | None]
MAX_TEXT = 2000
"""Maximum number of characters of one text."""


@dataclass(frozen=True, slots=True)
class ExportColumn:
    """One column. `kind` is the type of its values; a value that is None is unknown."""

    name: str
    kind: Kind
    description: str


@dataclass(frozen=True, slots=True)
class ExportTable:
    """One table: its columns, and a function that reads its rows from the history without keeping them."""

    name: str
    description: str
    columns: tuple[ExportColumn, ...]
    read: Callable[[HistoryReader, str], Iterator[Row]]

    def rows(self, history: HistoryReader, run: str) -> Iterator[Row]:
        """Yield the rows of `run`, each with one value per column of its kind or None. Raises StoreError."""
        try:
            for row in self.read(history, run):
                yield [_value(value, column.kind) for value, column in zip(row, self.columns, strict=True)]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:  # a forged or damaged file
            raise StoreError(f"run {run!r}: a row of the table {self.name} cannot be read: {one_line(error)}") from None


_PLACE = (
    ExportColumn("run", "text", "name of the run"),
    ExportColumn("launch", "text", "identifier of the launch: one start of the run"),
    ExportColumn("step", "integer", "optimizer step"),
    ExportColumn("time", "number", "Unix seconds"),
)
_TRAINING = {
    "learning_rate": "largest learning rate over the parameter groups, before the LR scale and within bounds on groups",
    "loss": "loss, measured or logged by the script, mean over ranks",
    "grad_norm": "norm of the gradients, measured or logged by the script, mean over ranks",
    "lr_scale": "LR scale in force: koopmon's factor on the learning rate",
    "kss_alpha": "weight of KSS in force",
    "kss_held_layers": "number of layers whose writing weights are under ceilings",
    "update_rms": "RMS over parameters of the gradient's norm over that of the root of its second moment",
    "log_partition": "mean log(sum(exp(logits))) of some tokens of the output, in nats",
}
_SCALARS = tuple(name for name in TrainingStep.__struct_fields__ if name != "step")
_MEANS = {
    "near_unit_mass": "near-unit mass, mean over the layers",
    "expansive_mass": "expansive mass, mean over the layers",
    "spectral_radius": "spectral radius, mean over the layers",
    "max_spectral_radius": "spectral radius, largest value over the layers",
    "update_ratio": "update ratio, mean over the layers",
    "nonlinearity_ratio": "nonlinearity ratio, mean over the layers",
    "reliable_mode_ratio": "reliable mode ratio, mean over the layers",
}
_LAYER = {
    "near_unit_mass": "share of eigenvalues with a modulus from 0.90 to 1.05",
    "expansive_mass": "share of eigenvalues with a modulus above 1.05",
    "contractive_mass": "share of eigenvalues with a modulus below 0.80",
    "spectral_radius": "largest modulus of the eigenvalues",
    "eigenvector_condition_number": "condition number of the eigenvectors",
    "nonlinearity_ratio": "share of the update that the linear map does not explain",
    "update_ratio": "norm of the update over the norm of the state",
    "update_exponent": "k of the fit: norm of the update ~ (norm of the state)^k",
    "reliable_mode_ratio": "share of modes with a residual of at most 0.1",
    "reliable_near_unit_mass": "near-unit share among the reliable modes",
    "stream_rms": "root mean square of the states behind the layer",
}


def _snapshots(history: HistoryReader, run: str) -> Iterator[Row]:
    for row in history.observations(run):
        point = TimelinePoint.of_row(row)
        yield (
            *(run, point.incarnation, point.step, point.time),
            *(point.risk, point.forecast, point.reason, point.informative, point.non_finite),
            *(getattr(point.training, name) for name in _SCALARS),
            *(row.observation.get(name) for name in _MEANS),
        )


def _layers(history: HistoryReader, run: str) -> Iterator[Row]:
    for row in history.profiles(run, eigenvalues=False):
        if row.profile is not None:
            columns = [row.profile.columns[name] for name in _LAYER]
            for index, (informative, *values) in enumerate(zip(row.profile.informative, *columns, strict=True)):
                yield (*(run, row.incarnation, row.step, row.time, index, informative), *values)


def _logged(history: HistoryReader, run: str) -> Iterator[Row]:
    latest: dict[tuple[str, str], int] = {}
    for row in history.heartbeats(run):
        for name, each in row.logged.items():
            # A heartbeat repeats the latest value.
            if latest.get((row.incarnation, name)) != each.step:
                latest[row.incarnation, name] = each.step
                yield (run, row.incarnation, each.step, row.time, name, each.value, each.low, each.high)


def _commands(history: HistoryReader, run: str) -> Iterator[Row]:
    for row in history.decisions(run):
        decision = DecisionView.of_row(row)
        for each in decision.commands:
            command = each.command
            yield (
                *(run, decision.incarnation, decision.step, decision.time, command.kind, each.words),
                *(command.reason, decision.risk, command.lr_scale, command.max_rate),
                *(None if command.kss is None else command.kss.alpha, each.outcome, each.applied_step, each.detail),
            )


TABLES = {
    table.name: table
    for table in (
        ExportTable(
            "snapshots",
            "one row for each snapshot",
            (
                *_PLACE,
                ExportColumn("risk", "number", "risk, from 0 to 1"),
                ExportColumn("forecast", "number", "probability of a divergence, from 0 to 1"),
                ExportColumn("reason", "text", "reason for the risk"),
                ExportColumn("informative", "flag", "false for a snapshot whose spectrum is not determined"),
                ExportColumn("non_finite", "flag", "true if the states held NaN or infinity"),
                *(ExportColumn(name, "number", _TRAINING.get(name, name.replace("_", " "))) for name in _SCALARS),
                *(ExportColumn(name, "number", text) for name, text in _MEANS.items()),
            ),
            _snapshots,
        ),
        ExportTable(
            "layers",
            "one row for each layer of each snapshot with finite states",
            (
                *_PLACE,
                ExportColumn("layer", "integer", "index of the layer, from 0"),
                ExportColumn("informative", "flag", "false for a layer whose spectrum is not determined"),
                *(ExportColumn(name, "number", text) for name, text in _LAYER.items()),
            ),
            _layers,
        ),
        ExportTable(
            "commands",
            "one row for each command",
            (
                *_PLACE,
                ExportColumn("kind", "text", "kind of the command, such as set_lr_scale"),
                ExportColumn("command", "text", "the command in words"),
                ExportColumn("reason", "text", "reason for the command"),
                ExportColumn("risk", "number", "risk at the decision"),
                ExportColumn("lr_scale", "number", "LR scale of the command"),
                ExportColumn("max_rate", "number", "cap on the learning rate"),
                ExportColumn("kss_alpha", "number", "weight of KSS"),
                ExportColumn("outcome", "text", "applied, refused, failed, expired, unanswered, dry_run or pending"),
                ExportColumn("applied_step", "integer", "step at which all ranks applied it"),
                ExportColumn("detail", "text", "detail of the acknowledgement"),
            ),
            _commands,
        ),
        ExportTable(
            "logged",
            "one row for each value of a scalar of `agent.log` in a recorded heartbeat",
            (
                *_PLACE,
                ExportColumn("name", "text", "name of the scalar"),
                ExportColumn("value", "number", "its value; unknown if it was not finite"),
                ExportColumn("band_low", "number", "lower limit of the band of its own history"),
                ExportColumn("band_high", "number", "upper limit of the band of its own history"),
            ),
            _logged,
        ),
    )
}
"""Tables of a run by name."""


def _value(value: Any, kind: Kind) -> str | int | float | bool | None:
    """Return `value` as its kind. Texts may come from a peer. Raises ValueError for another type."""
    if value is None:
        return None
    if kind == "text":
        return one_line(value, MAX_TEXT)
    if kind == "flag":
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    if kind == "number":
        return float(value)
    if isinstance(value, float) and (not math.isfinite(value) or value != int(value)):
        raise ValueError(f"expected an integer, got {value}")
    return int(value)
