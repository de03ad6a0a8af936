"""The closing summary of `koopmon run`, from a history of a real store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from koopmon.history.writer import HistoryWriter
from koopmon.views.run_summary import MAX_LAUNCHES, summarise
from koopmon.wire.messages import Ack, AckOutcome, Applied, Command, CommandKind, KssSettings
from tests.factories import hello, record_observation

RUN, INCARNATION = "run-1", "0123abcd"
WHO = {"run": RUN, "incarnation": INCARNATION}


class Writer:
    """A history with one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = HistoryWriter.open(path)
        self.count = 0

    def saw(self, step: int, risk: float) -> None:
        record_observation(self.store, 1.0, step, **WHO, risk=risk)

    def sent(
        self, step: int, outcome: AckOutcome | None, *, lr_scale: float | None = None, alpha: float | None = None
    ) -> None:
        self.count += 1
        name = f"{self.count:08x}"
        command = Command(
            **WHO,
            id=name,
            kind="set_kss" if alpha is not None else "set_lr_scale",
            reason="because",
            expires_step=step + 9,
            lr_scale=lr_scale,
            kss=None if alpha is None else KssSettings(alpha=alpha),
        )
        self.store.record_decision(
            1.0,
            RUN,
            INCARNATION,
            step,
            phase="backed_off",
            reason="because",
            risk=0.9,
            commands=[command],
            outcome="pending" if outcome else "dry_run",
        )
        if outcome:
            self.store.record_ack(1.0, Ack(**WHO, command_id=name, outcome=outcome, step=step + 1, applied=Applied()))

    def summary(self) -> str:
        self.store.close()
        found = summarise(self.path, RUN)
        assert found is not None
        return "\n".join(found.lines())


def test_a_guarded_run(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO, world_size=2, num_senders=2))
    for step, risk in ((2, 0.1), (4, 0.9), (6, 0.3)):
        writer.saw(step, risk)
    for scale in (0.5, 0.25, 0.5, 1.0, 0.5):
        writer.sent(4, "applied", lr_scale=scale)
    for alpha in (0.15, 0.0, 0.1):
        writer.sent(5, "applied", alpha=alpha)
    text = writer.summary()
    assert "3 snapshots up to step 6; highest risk 0.90 at step 4" in text
    assert "3 back-offs, LR scale down to 0.25" in text
    assert "KSS raised 2 times, to alpha 0.15" in text
    assert str(tmp_path / "h.sqlite3") in text


def test_what_was_not_applied_is_not_claimed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO, world_size=2, num_senders=2))
    writer.sent(1, "refused", lr_scale=0.5)
    writer.sent(2, "expired", alpha=0.15)
    writer.sent(3, None, lr_scale=0.5)
    text = writer.summary()
    assert "lowered" not in text
    assert "KSS" not in text
    assert "1 command held back" in text
    assert "2 commands not applied" in text


def test_a_run_that_was_left_alone(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO, world_size=2, num_senders=2))
    writer.saw(2, 0.1)
    assert "nothing was done to the training" in writer.summary()


def test_what_an_earlier_launch_left_in_force_is_said(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO))
    for step in (2, 4):
        record_observation(writer.store, 1.0, step, **WHO, lr_scale=0.35, kss_alpha=0.1)
    text = writer.summary()
    assert "LR scale 0.35 in force from the start, from the launch before; KSS alpha 0.1 in force" in text
    assert "nothing was done" not in text


def test_nobody_came(tmp_path: Path) -> None:
    assert "no training process attached" in Writer(tmp_path / "h.sqlite3").summary()
    assert summarise(tmp_path / "none.sqlite3", RUN) is None


def summary(tmp_path: Path, *, since: float = 0.0, launches: int = 1, **points: float) -> list[str]:
    """Closing lines of a run; each launch starts a second later and has a snapshot at step 1 with these fields."""
    store = HistoryWriter.open(tmp_path / "h.sqlite3")
    for number in range(launches):
        who = {"run": RUN, "incarnation": f"{number:08x}"}
        store.record_hello(float(number), hello(**who))
        for step in (1, 2):
            record_observation(store, float(number), step, **who, **{"risk": 0.1, **(points if step == 2 else {})})
    store.close()
    found = summarise(tmp_path / "h.sqlite3", RUN)
    assert found is not None
    return found.lines(since)


def test_the_lines_say_if_the_run_is_finite_and_how_to_see_it(tmp_path: Path) -> None:
    seen, done, where = summary(tmp_path)
    assert seen == "2 snapshots up to step 2; highest risk 0.10 at step 1; finite at the end"
    assert done == "nothing was done to the training"
    assert where == f"`koopmon report {RUN}` shows the run; history: {tmp_path / 'h.sqlite3'}"


@pytest.mark.parametrize("points", [{"non_finite": True}, {"loss": math.nan}, {"loss": math.inf}])
def test_a_run_that_is_not_finite_at_its_end_says_so(points: dict[str, float], tmp_path: Path) -> None:
    seen, *_ = summary(tmp_path, **points)
    assert seen.endswith("; NOT FINITE (states or loss) from step 2 on")


def test_a_risk_of_zero_has_no_step(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO))
    writer.saw(3, 0.004)
    assert "1 snapshot up to step 3; risk 0.00 throughout; finite at the end" in writer.summary()


def test_each_launch_of_the_job_has_a_line(tmp_path: Path) -> None:
    lines = summary(tmp_path, launches=3, since=1.0)
    assert [line.partition(":")[0] for line in lines] == [
        "launch 2",
        "launch 3",
        f"`koopmon report {RUN}` shows the run; history",
    ]
    assert lines[0].endswith("; finite at the end; nothing was done to the training")


def test_of_many_launches_the_last_have_a_line(tmp_path: Path) -> None:
    first, *lines = summary(tmp_path, launches=MAX_LAUNCHES + 2)
    assert first == f"{MAX_LAUNCHES + 2} launches, of which the last {MAX_LAUNCHES}:"
    assert len(lines) == MAX_LAUNCHES + 1


def test_a_launch_of_an_earlier_job_is_not_this_one(tmp_path: Path) -> None:
    assert "no training process attached" in summary(tmp_path, since=1.0)[0]


def test_a_job_that_ends_at_once_is_not_blamed_on_its_python(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.close()
    found = summarise(tmp_path / "h.sqlite3", RUN)
    assert found is not None
    (line,) = found.lines(brief=True)
    assert line == "NOT WATCHED: no training process attached: the job ended within seconds of its monitor's start"
    assert "its Python has no koopmon" in found.lines()[0]


def test_a_launch_without_a_snapshot_was_not_watched(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO))
    text = writer.summary()
    assert text.startswith("NOT WATCHED: no snapshot was seen; ")
    assert "nothing was done" not in text


@pytest.mark.parametrize("outcome", ["pending", "unanswered", "refused"])
def test_a_command_that_was_not_applied_is_no_action(tmp_path: Path, outcome: Any) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO))
    writer.saw(3, 0.9)
    command = Command(**WHO, id="00000001", kind="set_lr_scale", reason="because", expires_step=9, lr_scale=0.5)
    cadence = Command(**WHO, id="00000002", kind="set_cadence", reason="because", expires_step=9)
    writer.store.record_decision(
        1.0,
        RUN,
        INCARNATION,
        3,
        phase="acting",
        reason="because",
        risk=0.9,
        commands=[command, cadence],
        outcome=outcome,
    )
    text = writer.summary()
    assert "back-off" not in text
    assert ("1 command without an answer" in text) == (outcome != "refused")
    assert ("not applied" in text) == (outcome == "refused")


def test_requests_to_the_loop_are_counted(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "h.sqlite3")
    writer.store.record_hello(1.0, hello(**WHO))
    writer.saw(3, 0.9)
    kinds: tuple[CommandKind, ...] = ("checkpoint", "stop", "checkpoint")
    for number, kind in enumerate(kinds):
        command = Command(**WHO, id=f"{number:08x}", kind=kind, reason="because", expires_step=9)
        writer.store.record_decision(
            1.0, RUN, INCARNATION, 3, phase="acting", reason="because", risk=0.9, commands=[command], outcome="pending"
        )
        outcome: AckOutcome = "applied" if number < 2 else "failed"
        writer.store.record_ack(1.0, Ack(**WHO, command_id=command.id, outcome=outcome, step=4, applied=Applied()))
    assert "a checkpoint requested once; the training was asked to stop; 1 command not applied" in writer.summary()
