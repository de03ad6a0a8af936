"""docs/integrations.md: its loop and its study run as they are on the page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import Decoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))


def test_the_study_prunes_some_and_trains_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    shutil.copy(ROOT / "benchmarks" / "results" / "calibrator.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    trained: list[float] = []

    def train(model: Any, rate: float) -> float:
        trained.append(rate)
        return rate

    names = {
        "make_model": lambda: Decoder("none", width=64, num_layers=4),
        "tokens": torch.randint(256, (16, 32)),
        "train": train,
    }
    block = BLOCKS["optuna"].replace("create_study()", "create_study(sampler=optuna.samplers.RandomSampler(seed=1))")
    exec(block, names)
    study: Any = names["study"]
    pruned = [trial.params["lr"] for trial in study.trials if trial.state.name == "PRUNED"]
    assert len(pruned) + len(trained) == 8
    assert max(trained) < min(pruned)


def test_the_loop_mirrors_what_the_agent_knows() -> None:
    shown: list[tuple[str, int]] = []

    class Writer:
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            shown.append((tag, global_step))

    class Agent:
        def status(self) -> dict[str, Any]:
            return {"enabled": True, "judgement": {"risk": 0.5}, "applied": None, "overhead_ratio": 0.0}

    exec(BLOCKS["own-loop"], {"writer": Writer(), "agent": Agent(), "train_one_step": lambda: None})
    assert [step for tag, step in shown if tag == "koopmon/risk"] == [0, 1, 2]


def test_every_page_that_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
