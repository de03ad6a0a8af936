"""Write access to the history store for the monitor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from koopmon.history.journal import Journal, records
from koopmon.history.launches import Launches
from koopmon.history.plain_profile import Observables, PlainProfile, pack
from koopmon.history.schema import PACKED, packed_layers, scalar, to_json
from koopmon.wire.messages import Ack, Applied, Command, Heartbeat, Hello, TrainingStep


class HistoryWriter(Journal):
    """The only writer of a history file. Decisions and acks are committed at once; times are Unix seconds."""

    @records(commit=True, remember=Launches.joined)
    def record_hello(self, at: float, hello: Hello) -> None:
        """Record the hello of a rank; the hello of the lowest rank is kept."""
        row = self._incarnation(at, hello.run, hello.incarnation)
        self._database.execute(
            "UPDATE incarnations SET hello = ?, ended = NULL, end_reason = NULL"
            " WHERE id = ? AND (hello IS NULL OR ? = 0)",
            (to_json(hello), row, hello.process_rank),
        )
        self._database.execute("UPDATE runs SET state = 1, last_seen = ? WHERE name = ?", (at, hello.run))

    @records(remember=Launches.closed)
    def record_state(self, at: float, run: str, incarnation: str, state: int, *, end_reason: str | None = None) -> None:
        """Record a change of the run's state; `end_reason` also closes this incarnation."""
        row = self._incarnation(at, run, incarnation)
        self._database.execute("UPDATE runs SET state = ?, last_seen = ? WHERE name = ?", (state, at, run))
        if end_reason is not None:
            self._database.execute(
                "UPDATE incarnations SET ended = ?, end_reason = ? WHERE id = ?", (at, end_reason, row)
            )

    @records(commit=True, remember=Launches.reported)
    def record_applied(self, at: float, run: str, incarnation: str, step: int, applied: Applied) -> None:
        """Record the values in force that rank 0 reported."""
        self._set_applied(at, run, incarnation, step, applied)

    @records()
    def record_profile(
        self,
        /,
        at: float,
        run: str,
        incarnation: str,
        step: int,
        *,
        profile: PlainProfile | None,
        observables: Observables | None = None,
        **columns: float,
    ) -> None:
        """Record one snapshot: its profile, None for non-finite states, and its observables.

        The columns are num_shards, masked and seconds.
        """
        packed = pack(profile, observables)
        self._insert("profiles", at, run, incarnation, step=step, non_finite=profile is None, profile=packed, **columns)

    @records()
    def record_observation(
        self,
        /,
        at: float,
        run: str,
        incarnation: str,
        training: TrainingStep,
        *,
        observation: Any,
        components: Mapping[str, float],
        **columns: Any,
    ) -> None:
        """Record one input of the detector and its components. The columns are non_finite, risk and reason."""
        known = msgspec.to_builtins(observation)
        for repeated in ("training", "non_finite"):
            known.pop(repeated, None)
        packed = {name: packed_layers(known.pop(name, ())) for name in PACKED}
        known = {name: value for name, value in known.items() if value not in (None, "")}  # absent is unknown
        texts = {"observation": to_json(known), "components": to_json(components), **packed}
        self._insert("observations", at, run, incarnation, **msgspec.structs.asdict(training), **texts, **columns)

    @records(remember=Launches.remembered)
    def record_memory(self, at: float, run: str, incarnation: str, memory: bytes) -> None:
        """Record the controller checkpoint that a restarted monitor needs for this incarnation."""
        row = self._incarnation(at, run, incarnation)
        self._database.execute("UPDATE incarnations SET memory = ? WHERE id = ?", (memory, row))

    @records(commit=True)
    def record_decision(
        self,
        /,
        at: float,
        run: str,
        incarnation: str,
        step: int,
        *,
        commands: Sequence[Command],
        outcome: Literal["pending", "dry_run"],
        **columns: Any,
    ) -> None:
        """Record a decision with its commands. The columns are phase, reason and risk.

        The decision is on disk when this returns, before any of its commands is sent.
        """
        decision = self._insert("decisions", at, run, incarnation, step=step, **columns)
        self._database.executemany(
            "INSERT INTO commands (id, decision_id, time, kind, command, outcome) VALUES (?, ?, ?, ?, ?, ?)",
            [(command.id, decision, at, command.kind, to_json(command), outcome) for command in commands],
        )

    @records(commit=True)
    def abandon_pending(self, run: str) -> None:
        """Mark pending commands of an earlier monitor as unanswered: no controller waits for their acks."""
        self._database.execute(
            "UPDATE commands SET outcome = 'unanswered' WHERE outcome = 'pending' AND decision_id IN"
            " (SELECT d.id FROM decisions AS d JOIN incarnations AS i ON i.id = incarnation_id"
            " JOIN runs ON runs.id = run_id WHERE name = ?)",
            (run,),
        )

    @records(commit=True)
    def record_outcome(self, command_id: str, outcome: str) -> None:
        """Record the outcome of a command without an ack."""
        self._database.execute("UPDATE commands SET outcome = ? WHERE id = ?", (outcome, command_id))

    @records(commit=True, remember=Launches.acked)
    def record_ack(self, at: float, ack: Ack) -> None:
        """Record rank 0's ack of a command and the values in force.

        An ack is recorded only for a command of its own run, and only once per outcome. This bounds the rows that a
        peer can add. The outcome "duplicate" does not change the command's recorded outcome.
        """
        ours = (
            "SELECT c.id FROM commands AS c JOIN decisions AS d ON d.id = decision_id"
            " JOIN incarnations AS i ON i.id = incarnation_id JOIN runs ON runs.id = run_id WHERE c.id = ? AND name = ?"
        )
        self._database.execute(
            "INSERT INTO acks (command_id, time, outcome, step, detail, applied) SELECT ?, ?, ?, ?, ?, ?"
            f" WHERE EXISTS ({ours}) AND NOT EXISTS (SELECT 1 FROM acks WHERE command_id = ? AND outcome = ?)",
            (
                *(ack.command_id, at, ack.outcome, ack.step, ack.detail, to_json(ack.applied)),
                *(ack.command_id, ack.run),
                *(ack.command_id, ack.outcome),
            ),
        )
        self._database.execute(
            f"UPDATE commands SET outcome = ? WHERE id IN ({ours})"
            " AND outcome IN ('pending', 'unanswered', 'duplicate')",
            (ack.outcome, ack.command_id, ack.run),
        )
        self._set_applied(at, ack.run, ack.incarnation, ack.step, ack.applied)

    @records()
    def record_heartbeat(self, at: float, heartbeat: Heartbeat, logged: Mapping[str, Any] | None = None) -> None:
        """Record the scalars of one heartbeat, and the readings of the logged ones. The caller limits the rate."""
        run, scalars = heartbeat.run, msgspec.structs.asdict(heartbeat.training)
        scalars |= {name: getattr(heartbeat, name) for name in ("process_rank", "step_seconds", "overhead_ratio")}
        text = to_json(logged) if logged else None
        self._insert("heartbeats", at, run, heartbeat.incarnation, **scalars, logged=text)
        self._database.execute("UPDATE runs SET state = 1, last_seen = ? WHERE name = ?", (at, run))

    def _set_applied(self, at: float, run: str, incarnation: str, step: int, applied: Applied) -> None:
        values = (to_json(applied), step, self._incarnation(at, run, incarnation))
        self._database.execute("UPDATE incarnations SET applied = ?, applied_step = ? WHERE id = ?", values)

    def _insert(self, table: str, at: float, run: str, incarnation: str, **columns: Any) -> int | None:
        """Insert a row of an incarnation; return its id."""
        columns |= {"incarnation_id": self._incarnation(at, run, incarnation), "time": at}
        values = [scalar(value) if isinstance(value, float) else value for value in columns.values()]
        marks = ", ".join("?" * len(values))
        return self._database.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", values).lastrowid

    def _incarnation(self, at: float, run: str, incarnation: str) -> int:
        known = self._ids.get((run, incarnation))
        if known is not None:
            return known
        execute = self._database.execute
        execute("INSERT OR IGNORE INTO runs (name, first_seen, last_seen, state) VALUES (?, ?, ?, 1)", (run, at, at))
        (run_id,) = execute("SELECT id FROM runs WHERE name = ?", (run,)).fetchone()
        execute(
            "INSERT OR IGNORE INTO incarnations (run_id, incarnation, started) VALUES (?, ?, ?)",
            (run_id, incarnation, at),
        )
        where = (run_id, incarnation)
        (row,) = execute("SELECT id FROM incarnations WHERE run_id = ? AND incarnation = ?", where).fetchone()
        self._ids[run, incarnation] = int(row)
        return int(row)
