"""Real commands beside hostile plugins: `koopmon run`, `koopmon adapters` and its `check`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_hostile_plugins import adapter, method, write

pytestmark = pytest.mark.process

TRAIN = """
import argparse, hashlib, os, random, sys, time
import numpy, torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
rate = parser.parse_args().lr
ready = os.path.join(os.path.dirname(os.environ.get("KOOPMON_ENDPOINT", "").removeprefix("ipc://")), "ready")
end = time.monotonic() + 60
while "KOOPMON_ENDPOINT" in os.environ and not os.path.exists(ready) and time.monotonic() < end:
    time.sleep(0.05)  # the monitor starts beside this short script
torch.set_num_threads(1)
torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
model = nn.Sequential(nn.Linear(32, 32), nn.TransformerEncoder(block, 3, enable_nested_tensor=False), nn.Linear(32, 32))
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
for step in range(40):
    batch = torch.rand(4, 32, 32) + random.random() + float(numpy.random.rand())
    loss = (model(batch) - batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if os.environ.get("RANK", "0") == "0":
        print(step, loss.item().hex())
    time.sleep(0.02)
if "RANK" in os.environ:
    time.sleep(0.1)
    torch.distributed.destroy_process_group()
else:
    sys.exit(3)
"""


def named(name: str, methods: str = "", **options: str) -> str:
    return adapter(f"name = {name!r}\n{methods}", **options)


PLUGINS = {
    "exits": "import sys; sys.exit(7)",
    "interrupts": adapter(hook="raise KeyboardInterrupt"),
    "exits_later": named("exits_later", method("specificity", "sys.exit(8)")),
    "never_ends": "import time; time.sleep(3600)",
    "parses": "import argparse; argparse.ArgumentParser().parse_args()",
    "lacks": "import not_there_at_all",
    "misspelt": "def (",
    "claims_nan": named("claims_nan", method("specificity", "return float('nan')")),
    "ties": named("aaa", method("specificity", "return 10")),
    "takes": named("transformer"),
    "no_chain": named("no_chain", method("block_output", "return args[1] + 1")),
    "seeds": f"import random, numpy, torch\nprint('hello')\n{named('seeds', method('specificity', 'return 0'))}\n"
    "random.seed(9); numpy.random.seed(9); torch.manual_seed(9)\n"
    "torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)\n",
}
SAYS = {
    "exits": "is skipped: its import called sys.exit(7)",
    "interrupts": "is skipped: koopmon_architecture_adapters() raised KeyboardInterrupt",
    "exits_later": "specificity() of its adapter 'exits_later' called sys.exit(8)",
    "never_ends": "is skipped: its import was not over when the 10 s of this plugin were",
    "parses": "is skipped: its import called sys.exit(2)",
    "lacks": "is skipped: its import raised ModuleNotFoundError",
    "misspelt": "is skipped: its import raised SyntaxError",
    "claims_nan": "gives nan, allowed are integers from 0 to 100",
    "ties": "claims it with equal specificity 10",
    "takes": "adapter 'transformer' is left out: its name is taken by plugin transformer (koopmon",
    "no_chain": "failed: adapter 'no_chain' finds no residual chain",
    "seeds": "its import changed Python's random state, NumPy's random state, torch's random state, the default dtype",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    for name, source in PLUGINS.items():
        write(site, source, name, f"{name}_plugin")
    (tmp_path / "train.py").write_text(TRAIN)
    return site


@pytest.mark.slow
def test_a_training_beside_every_hostile_plugin_is_guarded_and_its_own(koopmon: Any, site: Path) -> None:
    words = [sys.executable, "train.py", "--lr", "0.001"]
    bare = subprocess.run(words, cwd=koopmon.directory, env=koopmon.environ, capture_output=True, check=False)
    assert bare.returncode == 3, bare.stderr
    (site / "ties-1.2.dist-info" / "entry_points.txt").unlink()  # a tie has no effect if another adapter claims more
    done = koopmon("run", "--summary", "end.json", "--", *words, PYTHONPATH=str(site))
    said = done.stderr.decode()
    assert done.returncode == 3, said
    assert done.stdout == bare.stdout, "losses equal in every bit, and nothing printed between them"
    for name, what in SAYS.items() - {("ties", SAYS["ties"])}:
        lines = [line for line in said.splitlines() if what in line and f"plugin {name} ({name} 1.2)" in line]
        assert len(lines) == 1, (name, said)
        assert lines[0].startswith("koopmon: ")
    assert "not attached" not in said
    assert "Traceback" not in said
    end = json.loads((koopmon.directory / "end.json").read_text())
    assert end["adapter"] == "transformer"
    assert end["num_snapshots"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_go_on_and_one_of_them_says_so(koopmon: Any, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "train.py").write_text(TRAIN)
    for name in ("exits", "ties"):
        write(site, PLUGINS[name], name, f"{name}_plugin")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = koopmon("run", "--summary", "end.json", "--", *words, "--lr", "0.001", PYTHONPATH=str(site))
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert [said.count(SAYS[name]) for name in ("exits", "ties")] == [1, 1], said
    assert json.loads((koopmon.directory / "end.json").read_text())["adapter"] == "transformer"


def test_the_list_of_adapters_shows_what_is_not_used_and_why(koopmon: Any, site: Path) -> None:
    for path in site.glob("never_ends*/entry_points.txt"):
        path.unlink()
    done = koopmon("adapters", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["name"]: row["distribution"] for row in found["adapters"]}["aaa"] == "ties 1.2"
    assert {row["name"]: row["distribution"].split()[0] for row in found["adapters"]}["transformer"] == "koopmon"
    assert {row["plugin"] for row in found["failures"]} == {"exits", "interrupts", "parses", "lacks", "misspelt"}
    (row,) = found["left_out"]
    assert (row["name"], row["plugin"], row["distribution"]) == ("transformer", "takes", "takes 1.2")
    assert "its name is taken by plugin transformer (koopmon" in row["reason"]
    table = koopmon("adapters", PYTHONPATH=str(site)).stdout.decode()
    assert "not used: its name is taken" in table
    assert "not usable: its import called sys.exit(7)" in table


OWN = (
    adapter(method("stacks", "sys.exit(4)"))
    + """
def make():
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return torch.nn.TransformerEncoder(block, 3, enable_nested_tensor=False), torch.randn(4, 12, 16)

def leave():
    sys.exit(6)
"""
)


@pytest.mark.parametrize("target", ["own.py:Theirs", "theirs"])
def test_a_check_of_an_adapter_that_exits_is_a_failed_check(koopmon: Any, tmp_path: Path, target: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    site = tmp_path / "site"
    site.mkdir()
    write(site, OWN)
    done = koopmon("adapters", "check", target, "--model", "own.py:make", "--json", PYTHONPATH=str(site))
    assert done.returncode == 1, done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["discovery"]["verdict"] == "failed"
    assert "SystemExit: 4" in rows["discovery"]["detail"]
    assert rows["settings"]["verdict"] == "failed"
    assert rows["example"]["verdict"] == "passed"


@pytest.mark.parametrize(
    "words",
    [
        ("profile", "own.py:leave"),
        ("profile", "ends.py:make"),
        ("doctor", "own.py:leave"),
        ("adapters", "check", "ends.py:make"),
        ("adapters", "check", "own.py:leave"),
    ],
)
def test_a_script_that_exits_where_it_is_imported_or_called_is_one_line(
    koopmon: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(6)\n")
    done = koopmon(*words)
    assert done.returncode not in (0, 6)
    assert "SystemExit: 6" in (done.stderr + done.stdout).decode()
    assert b"Traceback" not in done.stderr
