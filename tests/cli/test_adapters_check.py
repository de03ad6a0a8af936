"""`koopmon adapters check` on an installed package, on a faulty one, and without an adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from koopmon.conformance import BATTERY

ECHO = Path(__file__).parents[1] / "packages" / "echo"
OWN = """
import torch
from torch import Tensor, nn
import koopmon

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))

class Adapter(koopmon.ArchitectureAdapter):
    name = "own"

    def specificity(self, model):
        return 20 if self.stacks(model) else 0

    def stacks(self, model):
        lists = koopmon.block_lists(model)
        return [each.stack(residual=True) for each in lists if isinstance(each.blocks[0][1], Block)]

class Copying(Adapter):
    def block_output(self, module, output):
        return output + 0.0

class Raising(Adapter):
    def __init__(self):
        raise RuntimeError("not\\ntoday")

def make():
    return nn.Sequential(Block(), Block(), Block()), torch.randn(4, 12, 8)

number = 3
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example package, installed by pip from a copy of its source."""
    source, target = tmp_path_factory.mktemp("source") / "echo", tmp_path_factory.mktemp("site")
    shutil.copytree(ECHO, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
@pytest.mark.process
def test_an_installed_package_keeps_every_promise(koopmon: Any, site: Path) -> None:
    done = koopmon("adapters", "check", "koopmon-echo", "--json", PYTHONPATH=str(site))
    assert (done.returncode, done.stderr) == (0, b"")
    result = json.loads(done.stdout)
    assert [row["check"] for row in result["checks"]] == list(BATTERY)
    assert {(row["adapter"], row["model"]) for row in result["checks"]} == {("echo", "echo-small")}
    assert {row["verdict"] for row in result["checks"]} == {"passed"}
    assert (result["passed"], result["failed"], result["skipped"]) == (len(BATTERY), 0, 0)


@pytest.mark.process
def test_its_own_tests_run_under_pytest(site: Path, tmp_path: Path, koopmon: Any) -> None:
    shutil.copytree(ECHO / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-k", "not kss and not restraint", "tests"]
    environ = {**koopmon.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len([name for name in BATTERY if 'kss' not in name]) - 1} passed" in done.stdout


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the verb in this process, beside a file of the test."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str) -> subprocess.CompletedProcess[bytes]:
        try:
            status = main(("adapters", "check", *words))
        finally:
            sys.modules.pop("own", None)
        out, err = capfdbinary.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    return call


def test_a_broken_adapter_is_found_out_and_the_rest_reported(here: Any) -> None:
    done = here("own.py:Copying", "--model", "own.py:make")
    assert done.returncode == 1
    text = done.stdout.decode()
    assert "adapter own, model own.py:make" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert set(lines) >= set(BATTERY)
    assert "failed" in lines["reading"]
    assert "block_output at 0 gives a copy" in lines["reading"]
    assert "passed" in lines["claim"]
    assert "Traceback" not in text
    assert "failed" in text.splitlines()[-1]


def test_an_adapter_without_a_model_leaves_the_others_to_be_checked(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without the libraries of some families."""
    from koopmon_adapters import mamba, moe, transformer

    for family in (mamba, moe):
        monkeypatch.setattr(family, "find_spec", lambda name: None)
    monkeypatch.setattr(transformer, "find_spec", lambda name: None)
    only = {"settings": BATTERY["settings"]}
    monkeypatch.setattr(import_module("koopmon.conformance.checks"), "BATTERY", only)
    done = here("koopmon", "--json")
    assert done.returncode == 0
    rows = {(row["adapter"], row["model"]): row for row in json.loads(done.stdout)["checks"]}
    assert {pair for pair in rows if pair[0] != "kan"} == {
        ("mamba", "none"),
        ("moe", "none"),
        ("transformer", "torch-encoder"),
    }
    assert rows["moe", "none"]["verdict"] == "skipped"
    assert "no model to test with" in rows["moe", "none"]["detail"]
    assert rows["transformer", "torch-encoder"]["verdict"] == "passed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no_such_package"], ["'no_such_package'", "adapters are", "transformer"]),
        (["tomllib"], ["'tomllib' offers no adapter", "koopmon_architecture_adapters"]),
        (["own.py:Adapter"], ["'own'", "no model to test with", "--model"]),
        (["own.py:Missing"], ["own.py", "no object Missing"]),
        (["own.py:number"], ["'own.py:number'", "expected an ArchitectureAdapter"]),
        (["own.py:make"], ["'own.py:make'", "expected an ArchitectureAdapter"]),
        (["own.py:Raising"], ["RuntimeError: not"]),
        (["own.py:Adapter", "--model", "own.py:number"], ["'own.py:number'", "expected a function"]),
        (["own.py:Adapter", "--model", "missing.py:make"], ["missing.py", "no such file"]),
    ],
)
def test_bad_input_is_one_line(here: Any, one_line: Any, words: list[str], said: list[str]) -> None:
    one_line(here(*words), *said, status=2)


def test_a_package_that_cannot_be_imported_is_one_line(
    here: Any, one_line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[koopmon.adapters]\ntheirs = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    one_line(here("theirs"), "plugin theirs of theirs is not usable", "no_such_module", status=2)
