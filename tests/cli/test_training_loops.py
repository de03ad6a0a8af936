"""Training loops of public projects under `koopmon run`: watched bit for bit, and alive under a policy that acts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from koopmon.history.reader import HistoryReader
from tests.cli.programs.loops import LOOPS, STEPS

PROGRAM = Path(__file__).parent / "programs" / "loops.py"
DENSE = "[cadence]\nbudget_ratio = 0.5\ninitial_credit_seconds = 600.0\n"
HASTY = f"{DENSE}[policy]\nact_risk = 1e-8\nrelease_risk = 1e-9\n"
"""A policy that acts on the first snapshots."""


def guarded(koopmon: Any, name: str, text: str, *options: str) -> tuple[list[str], dict[str, Any], list[int]]:
    """Return the job's lines, the closing summary and the layers of each launch."""
    (koopmon.directory / "k.toml").write_text(text)
    options += ("--config", "k.toml", "--store", "s.sqlite3", "--summary", "s.json", "--run", "mine")
    done = koopmon("run", *options, "--", sys.executable, str(PROGRAM), name, TMPDIR="/tmp")
    assert done.returncode == 0, done.stderr.decode()
    assert b"not attached" not in done.stderr
    with HistoryReader.open(koopmon.directory / "s.sqlite3") as known:
        layers = [launch.hello.num_layers for launch in known.incarnations("mine") if launch.hello is not None]
    return done.stdout.decode().split(), json.loads((koopmon.directory / "s.json").read_text()), layers


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_the_same_while_it_is_watched(koopmon: Any, name: str) -> None:
    alone = koopmon.python(str(PROGRAM), name).stdout.decode().split()
    assert len(alone) > STEPS
    watched, summary, layers = guarded(koopmon, name, DENSE, "--policy", "observe")
    assert watched == alone
    assert layers == [4]
    assert summary["num_snapshots"] >= STEPS // 3
    assert summary["num_backoffs"] == summary["num_rewinds"] == 0


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_goes_on_to_its_end_while_koopmon_acts(koopmon: Any, name: str) -> None:
    lines, summary, layers = guarded(koopmon, name, HASTY, "--policy", "lr")
    losses = [float.fromhex(line) for line in lines[:-1]]
    assert len(losses) >= STEPS
    assert all(map(math.isfinite, losses))
    assert layers == [4]
    assert summary["num_backoffs"] >= 1
    assert summary["num_refused"] == 0
