"""A recorded run, decided again under another configuration: what would have been done, and when.

The recording is what it is: the states after an action of the replay are those of the training as it went, not as it
would have gone. So the first action and the alarms before it are certain; what follows it shows the policy's manners.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from koopmon import policy
from koopmon.config import Config, merged
from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HistoryReader, IncarnationRow, ObservationRow
from koopmon.risk import online_detector

KINDS = ("set_lr_scale", "set_kss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One snapshot, judged again. `recorded_risk` is what the monitor said then; `actions` are for the training."""

    incarnation: str
    step: int
    time: float
    recorded_risk: float
    risk: float
    phase: str
    reason: str
    actions: tuple[policy.Action, ...]
    lr_scale: float
    kss_alpha: float


def replay(history: HistoryReader, run: str, config: Config) -> Iterator[Replayed]:
    """Judge every snapshot of `run`, in order, each incarnation from a fresh start.

    An adapter's hints apply where `config` leaves the defaults, as they did then. Raises StoreError when the store
    knows no such run, the run has no snapshots, or a row cannot be read.
    """
    known = history.runs()
    if run not in known:
        raise StoreError(f"run {run!r}: the store knows {', '.join(known[-10:]) or 'none'}")
    hints = {row.incarnation: row for row in history.incarnations(run)}
    judge, seen = None, ""
    for row in history.observations(run):
        if judge is None or row.incarnation != seen:
            judge, seen = _Judge(config, hints.get(row.incarnation)), row.incarnation
        yield judge(row)
    if judge is None:
        raise StoreError(f"run {run!r}: no snapshot was recorded")


class _Judge:
    """Detector and policy of one incarnation; the scale and the weight are those that the replay would have set."""

    def __init__(self, config: Config, row: IncarnationRow | None) -> None:
        hello = None if row is None else row.hello
        hinted: dict[str, Any] = {} if hello is None or hello.kss is None else msgspec.structs.asdict(hello.kss)
        self._policy = config.policy
        self._risk = config.risk if hello is None else merged(config.risk, hello.thresholds, "thresholds")
        known = {name: value for name, value in hinted.items() if name in config.kss.__struct_fields__}
        self._kss = merged(config.kss, known, "kss")
        self._history, self._state = online_detector.RiskState(), policy.PolicyState()

    def __call__(self, row: ObservationRow) -> Replayed:
        try:
            recorded = msgspec.convert(row.observation, online_detector.Observation)
        except msgspec.ValidationError as error:
            raise StoreError(f"the snapshot at step {row.step} cannot be judged again: {one_line(error)}") from None
        scale, alpha = self._state.lr_scale, self._state.kss.alpha
        seen = replace(recorded, non_finite=row.non_finite, lr_scale=scale, kss_alpha=alpha)
        self._history, risk = online_detector.assess(self._history, seen, self._risk)
        decision = policy.decide(row.time, self._state, seen, risk, self._policy, self._kss)
        self._state = decision.state
        return Replayed(
            incarnation=row.incarnation,
            step=row.step,
            time=row.time,
            recorded_risk=row.risk,
            risk=risk.value,
            phase=decision.phase,
            reason=decision.reason,
            actions=tuple(action for action in decision.commands if action.kind in KINDS),
            lr_scale=self._state.lr_scale,
            kss_alpha=self._state.kss.alpha,
        )
