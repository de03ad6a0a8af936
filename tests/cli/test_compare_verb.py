"""`koopmon compare` as a command; tests/views/test_comparison.py tests its facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koopmon.cli import main
from tests.reading import Reading
from tests.report.recorder import Recorder, guarded


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with one bad run of width 12 and two good runs of width 6."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("good-1", "good-2", "bad"):
        path = tmp_path / "koopmon" / "runs" / f"{name}.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(path, name)
        if name == "bad":
            guarded(recorder)
            recorder.hello(width=12)
        else:
            recorder.hello()
            recorder.saw(1, 0.1, 3.0)
            recorder.ended()
        recorder.close()
    return tmp_path


def test_the_figures_stand_side_by_side_with_what_the_bad_one_has_alone(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "good-1", "bad", "good-2"]) == 0
    text = capsys.readouterr().out
    (verdicts,) = [line for line in text.splitlines() if "verdict" in line]
    assert [cell.strip().split(":")[0] for cell in verdicts.strip("│").split("│")] == ["verdict", "good", "bad", "good"]
    assert "0.85 at step 40" in text
    assert "3 → 2.8" in text
    assert text.splitlines()[-2:] == ["only the bad runs (1 of 3) have in common:", "  width: 12 (good runs: 6)"]


def test_the_same_as_data(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "good-1", "bad", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in told["runs"]] == ["good-1", "bad"]
    assert [run["problem"] is None for run in told["runs"]] == [True, False]
    assert told["only_bad"] == [{"fact": "width", "relation": "equal", "bad": [12.0], "good": [6.0]}]


def test_the_configuration_defines_a_bad_run(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "k.toml").write_text("[policy]\nact_risk = 0.9\nsevere_risk = 0.95\n")
    assert main(["compare", "good-1", "bad", "--config", "k.toml"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all runs are good: no risk of 0.90 or more"


def test_a_page_has_the_figures_and_a_chart_of_each_run(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "good-1", "bad", "--out", "c.html"]) == 0
    read = Reading((state / "c.html").read_text())
    assert [text for level, text in read.headings if level == 3] == ["good-1", "bad"]
    assert "width: 12 (good runs: 6)" in read.text
    assert "0.85 at step 40" in read.text
    charts = [each for each in read.of("svg") if each.get("class") == "chart"]
    assert sum("Risk and forecast" in each["aria-label"] for each in charts) == 2
    assert "script" not in {name for name, _ in read.tags}
    assert main(["compare", "good-1", "good-2", "--out", "c.html"]) == 0
    assert "all runs are good: no risk of 0.40 or more" in Reading((state / "c.html").read_text()).text


def test_a_page_that_cannot_be_written_is_one_line(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "bad", "good-1", "--out", "none/c.html"]) == 1
    assert capsys.readouterr().err == "koopmon: --out none/c.html: cannot be written: No such file or directory\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bad"], "expected two or more different runs"),
        (["bad", "bad"], "expected two or more different runs"),
        (["bad", "goood-1"], "did you mean good-1"),
        (["bad", "good-1", "--store", "none"], "store none: no such file"),
        (["bad", "good-1", "--config", "none.toml"], "none.toml: cannot be read"),
    ],
)
def test_bad_input_is_one_line(state: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["compare", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
