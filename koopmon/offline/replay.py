"""Replay of a recorded run under another configuration: risk, decisions and actions at every snapshot.

The recorded states do not react to the actions of the replay. The replay is exact up to its first action. Later entries
show the decisions of the policy on the recorded states only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from koopmon import policy
from koopmon.config import Config, with_hints
from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HistoryReader
from koopmon.history.rows import IncarnationRow, ObservationRow
from koopmon.risk import online_detector


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Assessment and decision of one snapshot in the replay."""

    incarnation: str
    step: int
    """Optimizer step of the snapshot."""
    time: float
    """Time of the recorded row, in seconds."""
    recorded_risk: float
    """Risk that the monitor recorded, in [0, 1]."""
    risk: float
    """Risk of the replay, in [0, 1]."""
    phase: str
    """Phase of the policy after the snapshot."""
    reason: str
    """Reason for the decision."""
    actions: tuple[policy.Action, ...]
    """Actions that change the training."""
    lr_scale: float
    """LR scale that the replay commanded last."""
    kss_alpha: float
    """Weight of KSS that the replay commanded last."""


def replay(history: HistoryReader, run: str, config: Config) -> Iterator[Replayed]:
    """Assess and decide every snapshot of a run, in order.

    Each incarnation starts with an empty history. The hints of the adapter apply where `config` has the defaults, as in
    the monitor.

    Args:
        history: the store.
        run: name of the run.
        config: the configuration of the replay; its tables [risk], [policy] and [kss] count.

    Yields:
        One entry for each snapshot.

    Raises:
        StoreError: the store has no such run, the run has no snapshots, or a row cannot be read.
    """
    known = history.runs()
    if run not in known:
        raise StoreError(f"run {run!r}: the store has {', '.join(known[-10:]) or 'none'}")
    hints = {row.incarnation: row for row in history.incarnations(run)}
    judge, seen = None, ""
    for row in history.observations(run):
        if judge is None or row.incarnation != seen:
            judge, seen = _Judge(config, hints.get(row.incarnation)), row.incarnation
        yield judge(row)
    if judge is None:
        raise StoreError(f"run {run!r}: no snapshot was recorded")


class _Judge:
    """Detector and policy of one incarnation."""

    def __init__(self, config: Config, row: IncarnationRow | None) -> None:
        hello = None if row is None else row.hello
        self._policy = config.policy
        self._risk, self._kss = (config.risk, config.kss) if hello is None else with_hints(config, hello)
        self._history, self._state = online_detector.RiskState(), policy.PolicyState()

    def __call__(self, row: ObservationRow) -> Replayed:
        try:
            # The scale and the weight are those of the replay; the recorded ones belong to other decisions.
            in_force = {"lr_scale": self._state.lr_scale, "kss_alpha": self._state.kss.alpha}
            known = {"training": msgspec.structs.asdict(row.training) | in_force, "non_finite": row.non_finite}
            seen = msgspec.convert(row.observation | known, online_detector.Observation)
            self._history, risk = online_detector.assess(self._history, seen, self._risk)
        except (msgspec.ValidationError, ArithmeticError, LookupError, ValueError) as error:  # a forged file
            raise StoreError(f"the snapshot at step {row.step} cannot be assessed again: {one_line(error)}") from None
        decision = policy.decide(row.time, self._state, seen, risk, self._policy, self._kss)
        # No agent answers a rewind here.
        self._state = replace(decision.state, rewinding=False) if decision.state.rewinding else decision.state
        return Replayed(
            incarnation=row.incarnation,
            step=row.step,
            time=row.time,
            recorded_risk=row.risk,
            risk=risk.value,
            phase=decision.phase,
            reason=decision.reason,
            actions=tuple(action for action in decision.commands if action.changes_training),
            lr_scale=self._state.lr_scale,
            kss_alpha=self._state.kss.alpha,
        )
