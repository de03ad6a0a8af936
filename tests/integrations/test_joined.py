"""A callback in a job under `koopmon run`: one agent and one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from koopmon.history.reader import HistoryReader
from tests.integrations.conftest import PROGRAMS, TORCHRUN, ended_well


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("program", ["train_huggingface.py", "train_lightning.py"])
def test_the_callback_uses_the_agent_that_is_there(program: str, tmp_path: Path) -> None:
    store, out = tmp_path / "store.sqlite3", tmp_path / "out"
    phases = json.dumps([{"lr": 0.001, "steps": 12, "run": "of-the-callback"}])
    guard = ("-m", "koopmon", "run", "--run", "of-the-job", "--policy", "observe", "--store", str(store), "--")
    ended_well((*guard, sys.executable, *TORCHRUN, str(PROGRAMS / program), str(out), phases))
    for rank in range(2):
        (phase,) = json.loads(Path(f"{out}.{rank}").read_text())
        assert phase["joined"]
        assert phase["status"]["layout"] == "ddp"
        assert phase["closed"] == "", "who attached it closes it, at the end of the process"
        assert len(phase["losses"]) == 12
    with HistoryReader.open(store) as history:
        assert list(history.runs()) == ["of-the-job"]
        assert len(history.incarnations("of-the-job")) == 1
        assert len(list(history.profiles("of-the-job"))) >= 3
