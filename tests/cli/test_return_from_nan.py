"""A training under `koopmon run` whose weights become NaN or infinite goes on from a copy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "nan_batch.py"


def trained(
    koopmon: Any, layers: str, kind: str, *options: str, ranks: int = 1
) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Return what each rank wrote, the closing summary and the lines of the job."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    words = [sys.executable, *([*launcher, str(ranks)] if ranks > 1 else []), str(PROGRAM), "out", layers, kind]
    options = ("--run", "mine", "--store", "s.sqlite3", "--summary", "s.json", *options)
    done = koopmon("run", *options, "--", *words, TMPDIR="/tmp")
    lines = done.stderr.decode()
    assert done.returncode == 0, lines
    found = [json.loads((koopmon.directory / f"out.{rank}").read_text()) for rank in range(ranks)]
    return found, json.loads((koopmon.directory / "s.json").read_text()), lines


@pytest.mark.process
@pytest.mark.parametrize(("layers", "kind"), [("norm", "loss"), ("plain", "gradient"), ("norm", "weight")])
def test_it_returns_to_a_copy_and_keeps_its_rate(koopmon: Any, layers: str, kind: str) -> None:
    (found,), summary, lines = trained(koopmon, layers, kind)
    assert found["healed"] is not None
    assert found["finite"]
    assert (summary["num_rewinds"], summary["num_backoffs"]) == (1, 0)
    assert "the learning rate is not capped; the states and the" in lines
    assert "not finite: back to the last copy" in lines


@pytest.mark.process
def test_a_policy_without_rewinds_leaves_it_as_it_is(koopmon: Any) -> None:
    (found,), summary, _ = trained(koopmon, "norm", "loss", "--policy", "lr")
    assert found["healed"] is None
    assert summary["num_rewinds"] == 0


@pytest.mark.distributed
def test_an_infinite_gradient_of_one_rank_returns_all_ranks_to_one_copy(koopmon: Any) -> None:
    found, summary, _ = trained(koopmon, "norm", "gradient", ranks=2)
    assert [each["finite"] for each in found] == [True, True]
    assert found[0]["digest"] == found[1]["digest"]
    assert summary["num_rewinds"] == 1
