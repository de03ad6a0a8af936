"""Recipes under docs/recipes, run as they are on their pages, in real ranks under `koopmon run`."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from koopmon.history.reader import HistoryReader
from tests.recipes.conftest import ROOT, blocks, launching

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
Recipe = Callable[..., tuple[str, dict[str, Any]]]


def guarded(summary: dict[str, Any]) -> None:
    assert summary["exit_status"] == 0
    assert summary["num_snapshots"] >= 3, summary
    assert summary["adapter"] == "transformer"


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_accelerate(recipe: Recipe) -> None:
    said, summary = recipe("accelerate.md")
    assert "trained, loss" in said
    guarded(summary)


def test_torchtitan(recipe: Recipe) -> None:
    said, summary = recipe("torchtitan.md")
    assert "trained, loss" in said
    guarded(summary)


def test_megatron(recipe: Recipe) -> None:
    said, summary = recipe("megatron.md")
    assert "trained, loss" in said
    assert "layout unknown, acts False" in said
    assert said.count("no one model owns all of the optimizer's parameters") == 1
    guarded(summary)


def test_trl(recipe: Recipe) -> None:
    if find_spec("trl") is None:
        pytest.skip("TRL is in no extra")
    said, summary = recipe("trl.md")
    assert "trained, loss" in said
    guarded(summary)


def test_peft(recipe: Recipe) -> None:
    if find_spec("peft") is None:
        pytest.skip("PEFT is in no extra")
    said, summary = recipe("peft.md")
    assert "trained, loss" in said
    guarded(summary)


@pytest.mark.parametrize("page", ["deepspeed.md", "skypilot.md"])
def test_a_recipe_that_is_not_run_says_so(page: str) -> None:
    text = (ROOT / "docs" / "recipes" / page).read_text(encoding="utf-8")
    assert text.split("\n\n")[1].startswith("This recipe was not run: ")
    for title, code in blocks(page).items():
        if title.endswith(".py"):
            compile(code, title, "exec")
        elif title.endswith(".yaml"):
            assert "koopmon run --run" in yaml.safe_load(code)["run"]


def test_ray_train_is_python_and_says_that_it_is_not_run() -> None:
    compile(blocks("ray-train.md")["train_ray.py"], "train_ray.py", "exec")
    text = (ROOT / "docs" / "recipes" / "ray-train.md").read_text()
    assert text.split("\n\n")[1].startswith("The tests do not run this recipe")


def test_more_than_one_node(tmp_path: Path) -> None:
    found = blocks("multi-node.md")
    (tmp_path / "train.py").write_text(found["train.py"])
    with socket.create_server(("127.0.0.1", 0)) as control, socket.create_server(("127.0.0.1", 0)) as meeting:
        ports = {":9465": f":{control.getsockname()[1]}", "29500": str(meeting.getsockname()[1])}
    replaced = {"MONITOR_HOST": "127.0.0.1", "FIRST_HOST": "127.0.0.1", **ports}

    def start(title: str, node: int = 0) -> subprocess.Popen[str]:
        text = found[title].replace("\\\n", " ").replace("NODE ", f"{node} ")
        for old, new in replaced.items():
            text = text.replace(old, new)
        words = shlex.split(text)
        assert words[0] == "koopmon"
        words += ["--http", "127.0.0.1:0"] if title == "monitor" else []
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=launching(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    started = [start("refused")]
    try:
        _, said = started[0].communicate(timeout=60)
        assert started[0].returncode == 2
        assert said.count("\n") == 1
        assert "--nnodes 2" in said
        assert "--monitor" in said
        started.append(start("monitor"))
        port = int(ports[":9465"][1:])
        deadline = time.monotonic() + 60.0
        while not listening(port):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started += [start("node", node) for node in range(2)]
        for node, job in enumerate(started[2:]):
            out, said = job.communicate(timeout=150)
            assert job.returncode == 0, said
            assert f"rank {node} trained" in out
        started[1].terminate()
        assert started[1].wait(60) == 0
    finally:
        for each in started:
            each.kill()
            each.communicate()
    with HistoryReader.open(tmp_path / "history.sqlite3") as history:
        assert list(history.runs()) == ["pretrain-7"]
        assert len(history.incarnations("pretrain-7")) == 1
        assert {row.process_rank for row in history.heartbeats("pretrain-7")} == {0, 1}
        # On a loaded machine a snapshot may lose a shard. The recipe promises that both nodes contribute to some
        # snapshots.
        assert max(row.num_shards for row in history.profiles("pretrain-7")) == 2
