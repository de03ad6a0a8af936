"""The closing summary of `koopmon run`, from a history of a real store."""

from __future__ import annotations

from pathlib import Path

from koopmon.history.writer import HistoryWriter
from koopmon.views.run_summary import summarise
from koopmon.wire.messages import Ack, AckOutcome, Applied, Command, KssSettings
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


def test_nobody_came(tmp_path: Path) -> None:
    assert "no training process attached" in Writer(tmp_path / "h.sqlite3").summary()
    assert summarise(tmp_path / "none.sqlite3", RUN) is None
