"""Forged files of others, read by the verbs: one line, nothing raw in a terminal or a page, no file of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koopmon.cli import main
from koopmon.cli.live_monitors import announce, live_monitors
from tests.report.recorder import Recorder

NAMES = {
    "escape": "a\x1b]0;mine\x07",
    "new line": "a\nkoopmon: all is well",
    "markup": "a</title><script>alert(1)</script>",
    "direction": "a\u202eb",
    "path": "../../elsewhere",
    "formula": "=cmd()",
    "option": "--help",
    "NUL": "a\0b",
    "empty": "",
    "long": "a" * 129,
}
VERBS = {
    "report": ["report"],
    "report --json": ["report", "--json"],
    "runs": ["runs"],
    "runs --json": ["runs", "--json"],
    "runs rm": ["runs", "rm", "a"],
    "runs prune": ["runs", "prune", "--older-than", "1m", "--yes"],
    "compare": ["compare", "a", "b"],
    "export": ["export"],
    "replay": ["replay"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    working = tmp_path / "here"
    working.mkdir()
    monkeypatch.chdir(working)
    return working


def check_harmless(out: str, err: str, name: str) -> None:
    for line in (out + err).splitlines():
        assert line.isprintable(), line
    assert "Traceback" not in err
    assert not name or name not in out
    assert "<script>" not in out


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_forged_name_in_a_history(verb: list[str], name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(here.parent / "h.sqlite3", run=name)
    recorder.saw(1, 0.9, 3.0)
    recorder.close()
    assert main([*verb, "--store", str(here.parent / "h.sqlite3")]) in (1, 2)
    out, err = capsys.readouterr()
    check_harmless(out, err, name)
    assert len(err.splitlines()) == 1, err
    assert list(here.iterdir()) == []


FORGED = {
    "run": list(NAMES.values()),
    "page": ["javascript:alert(1)", "http://a\x1b[2J", "http://a b"],
    "store": ["/a\0b", "/a\x1b[2J", "relative", 3],
    "started": [1e300, -1.0, "x"],
    "pid": ["x", None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FORGED.items() for value in values])
def test_a_forged_announcement_of_a_monitor(
    field: str, value: object, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = announce("job", "http://127.0.0.1:1/", here / "h.sqlite3")
    assert held is not None
    assert [each.run for each in live_monitors()] == ["job"]
    (file,) = (here.parent / "state/koopmon/live").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    assert live_monitors() == []
    assert main(["runs"]) == 0
    check_harmless(*capsys.readouterr(), str(value) if field == "run" else "")
    held.close()
