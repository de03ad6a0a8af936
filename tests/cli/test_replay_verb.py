"""`koopmon replay` as a command; tests/offline/test_replay.py tests its decisions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from koopmon.cli import main
from koopmon.history.writer import HistoryWriter
from tests.factories import observation, record_observation


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with the history of one run with a jump at step 10 and no action."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    path = tmp_path / "koopmon" / "runs" / "team,run.sqlite3"
    path.parent.mkdir(parents=True)
    store = HistoryWriter.open(path)
    for step in range(20):
        ratios = (0.5, math.exp(3.0) if step in (10, 12) else 0.5)
        seen = observation(step, update_ratios=ratios, near_unit_mass=0.95)
        record_observation(store, float(step), step, "team/run", "0123abcd", observation=seen, risk=0.25)
    store.close()
    return tmp_path


def test_it_finds_the_runs_own_history_and_says_what_would_have_been_done(
    state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "team/run", "--policy", "lr"]) == 0
    said = capsys.readouterr().out
    assert "20 snapshots, steps 0 to 19" in said
    assert "then: nothing was done; now: acted at" in said
    assert "first at step 10" in said
    assert "the states are the recorded ones" in said


def test_the_configuration_is_that_of_run(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deaf = state_home / "deaf.toml"
    deaf.write_text('[policy]\nname = "lr"\n[risk]\npeak_scale = 100\nspeed_scale = 100\nrestlessness_scale = 100\n')
    assert main(["replay", "team/run", "--config", str(deaf), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] == "lr"
    assert len(told["snapshots"]) == 20
    assert not any(row["actions"] for row in told["snapshots"])
    assert all(row["recorded_risk"] == 0.25 for row in told["snapshots"])
    assert main(["replay", "team/run", "--config", str(deaf)]) == 0
    text = capsys.readouterr().out
    assert "now: nothing was done\n" in text, "and no scale of 1"


def test_the_default_policy_needs_no_option(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "team/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["team/run", "--policy", "lrr"], "'lrr': allowed are "),
        (["team/run", "--policy", "careful.toml"], "a configuration file is for --config"),
        (["team/run", "--config", "none.toml"], "none.toml: cannot be read"),
        (["nobody", "--policy", "lr"], "run 'nobody': not in"),
        (["nobody", "--policy", "lr", "--store", "OWN"], "the last ones are team/run"),
        (["team/run", "--policy", "lr", "--store", "CUT"], "cut.sqlite3"),
    ],
)
def test_bad_input_is_one_line(
    state_home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    own = state_home / "koopmon" / "runs" / "team,run.sqlite3"
    cut = state_home / "cut.sqlite3"
    cut.write_bytes(own.read_bytes()[:3000])
    paths = {"OWN": str(own), "CUT": str(cut)}
    assert main(["replay", *(paths.get(word, word) for word in arguments)]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
