"""Reading a history store: what `report`, `replay` and tests ask of it. Safe beside a monitor that writes."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import msgspec

from koopmon.errors import StoreError
from koopmon.monitor.schema import check, from_scalar, unpacked_profile
from koopmon.wire.messages import Applied, Command, Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class IncarnationRow:
    """One launch of a run. Times are Unix seconds; `ended` is None while it goes on."""

    run: str
    incarnation: str
    started: float
    ended: float | None
    end_reason: str | None
    hello: Hello | None
    applied: Applied | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One snapshot. `profile` is what SpectralProfile.from_dict takes; None when the states were not finite."""

    incarnation: str
    step: int
    time: float
    num_shards: int
    masked: bool
    seconds: float
    profile: dict[str, Any] | None
    observables: dict[str, list[float | None]]
    """What the model's family measured, by name: one value per transition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationRow:
    """What the detector saw and how it judged it."""

    incarnation: str
    step: int
    time: float
    learning_rate: float | None
    loss: float | None
    grad_norm: float | None
    lr_scale: float
    kss_alpha: float
    non_finite: bool
    observation: dict[str, Any]
    risk: float
    reason: str
    components: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRow:
    """One command; `outcome` is "pending", "sent", "dry_run", "unanswered", or that of its last ack at `acked_step`."""

    command: Command
    time: float
    outcome: str
    acked_step: int | None
    detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionRow:
    """One decision of the policy with its commands."""

    incarnation: str
    step: int
    time: float
    phase: str
    reason: str
    risk: float
    commands: tuple[CommandRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRow:
    """The scalars of one heartbeat; None is unknown."""

    incarnation: str
    process_rank: int
    time: float
    step: int
    learning_rate: float | None
    loss: float | None
    grad_norm: float | None
    step_seconds: float | None
    overhead_ratio: float
    lr_scale: float
    kss_alpha: float


_OF_RUN = " JOIN incarnations ON incarnations.id = t.incarnation_id JOIN runs ON runs.id = run_id WHERE name = ?"


class History:
    """A store opened for reading. Rows come in the order in which they were written."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._database.row_factory = sqlite3.Row

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Raises StoreError when the file is missing, unreadable, not a store, or of another schema."""
        path = Path(path)
        if not path.is_file():
            raise StoreError(f"store {path}: no such file")
        try:
            database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=5.0)
            try:
                check(database, path)
            except BaseException:
                database.close()
                raise
        except sqlite3.Error as error:
            raise StoreError(f"store {path}: {error}") from None
        return cls(database)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def runs(self) -> list[str]:
        """Names of all runs, oldest first."""
        return [row["name"] for row in self._database.execute("SELECT name FROM runs ORDER BY first_seen, id")]

    def incarnations(self, run: str) -> list[IncarnationRow]:
        query = "SELECT t.*, name FROM incarnations AS t JOIN runs ON runs.id = run_id WHERE name = ? ORDER BY t.id"
        return [
            IncarnationRow(
                run=row["name"],
                incarnation=row["incarnation"],
                started=row["started"],
                ended=row["ended"],
                end_reason=row["end_reason"],
                hello=None if row["hello"] is None else msgspec.json.decode(row["hello"], type=Hello),
                applied=None if row["applied"] is None else msgspec.json.decode(row["applied"], type=Applied),
            )
            for row in self._database.execute(query, (run,))
        ]

    def profiles(self, run: str) -> Iterator[ProfileRow]:
        for row in self._of_run("profiles", run):
            profile, observables = unpacked_profile(row["profile"], non_finite=bool(row["non_finite"]))
            yield ProfileRow(
                incarnation=row["incarnation"],
                step=row["step"],
                time=row["time"],
                num_shards=row["num_shards"],
                masked=bool(row["masked"]),
                seconds=row["seconds"],
                profile=profile,
                observables=observables,
            )

    def observations(self, run: str) -> Iterator[ObservationRow]:
        for row in self._of_run("observations", run):
            yield ObservationRow(
                incarnation=row["incarnation"],
                step=row["step"],
                time=row["time"],
                learning_rate=from_scalar(row["learning_rate"]),
                loss=from_scalar(row["loss"]),
                grad_norm=from_scalar(row["grad_norm"]),
                lr_scale=row["lr_scale"],
                kss_alpha=row["kss_alpha"],
                non_finite=bool(row["non_finite"]),
                observation=json.loads(row["observation"]),
                risk=row["risk"],
                reason=row["reason"],
                components=json.loads(row["components"]),
            )

    def decisions(self, run: str) -> Iterator[DecisionRow]:
        for row in self._of_run("decisions", run):
            yield DecisionRow(
                incarnation=row["incarnation"],
                step=row["step"],
                time=row["time"],
                phase=row["phase"],
                reason=row["reason"],
                risk=row["risk"],
                commands=tuple(self._commands(row["id"])),
            )

    def heartbeats(self, run: str) -> Iterator[HeartbeatRow]:
        for row in self._of_run("heartbeats", run):
            yield HeartbeatRow(
                incarnation=row["incarnation"],
                process_rank=row["process_rank"],
                time=row["time"],
                step=row["step"],
                learning_rate=from_scalar(row["learning_rate"]),
                loss=from_scalar(row["loss"]),
                grad_norm=from_scalar(row["grad_norm"]),
                step_seconds=from_scalar(row["step_seconds"]),
                overhead_ratio=row["overhead_ratio"],
                lr_scale=row["lr_scale"],
                kss_alpha=row["kss_alpha"],
            )

    def _of_run(self, table: str, run: str) -> Iterator[sqlite3.Row]:
        query = f"SELECT t.*, incarnation FROM {table} AS t{_OF_RUN} ORDER BY t.id"
        yield from self._database.execute(query, (run,))

    def _commands(self, decision_id: int) -> Iterator[CommandRow]:
        query = (
            "SELECT commands.*, acks.step AS acked_step, acks.detail AS detail FROM commands"
            " LEFT JOIN acks ON acks.id = (SELECT max(id) FROM acks WHERE command_id = commands.id)"
            " WHERE decision_id = ? ORDER BY commands.rowid"
        )
        for row in self._database.execute(query, (decision_id,)):
            yield CommandRow(
                command=msgspec.json.decode(row["command"], type=Command),
                time=row["time"],
                outcome=row["outcome"],
                acked_step=row["acked_step"],
                detail=row["detail"],
            )
