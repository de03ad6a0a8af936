"""The agent's install: a virtual environment with the wheel, the agent's four needs, and torch."""

from __future__ import annotations

import subprocess
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from koopmon import __version__
from koopmon.cli import VERBS
from koopmon.wire.messages import Goodbye
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.distributions import build, closure, copy_of_tracked, link_installed, requirements

pytestmark = pytest.mark.process
TRAIN = """
import sys, torch, koopmon
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(16, 16)
    def forward(self, x):
        return x + self.line(x)

torch.manual_seed(0)
model = nn.Sequential(*[Block() for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
if sys.argv[1:]:
    koopmon.attach(model, optimizer, endpoint=sys.argv[1], run="attached")
for _ in range(30):
    loss = model(torch.randn(8, 6, 16)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
absent = [name for name in ("typer", "rich", "prometheus_client", "starlette", "yaml") if name in sys.modules]
print("steps: 30", absent)
"""
Koopmon = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of the environment."""
    place = tmp_path_factory.mktemp("agent")
    venv.create(place / "venv", symlinks=True)
    (site,) = (place / "venv").glob("lib/python*/site-packages")
    source = copy_of_tracked(tmp_path_factory.mktemp("source"))
    with zipfile.ZipFile(build("wheel", source, place)) as wheel:
        wheel.extractall(site)
        link_installed(closure("torch", *[each.name for each in requirements(wheel) if each.marker is None]), site)
    return place / "venv/bin/python"


@pytest.fixture
def koopmon(python: Path, tmp_path: Path) -> Koopmon:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
        command = [str(python), "-m", "koopmon", *words]
        return subprocess.run(
            command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )

    return call


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "run"])
def test_every_other_verb_is_one_sentence_with_the_command(koopmon: Koopmon, verb: str) -> None:
    done = koopmon(verb, "--json")
    line = f"koopmon: koopmon {verb} needs typer, which is not installed: pip install 'koopmon[monitor]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_monitor_of_its_own_is_one_sentence_with_the_command(koopmon: Koopmon) -> None:
    for options in ([], ["--policy", "lr"]):
        done = koopmon("run", *options, "--", "true")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "koopmon: koopmon run without --monitor ENDPOINT needs typer, which is not installed: "
            "pip install 'koopmon[monitor]'\n"
        )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rnu"], "No such command 'rnu'."),
        (["run", "--monitor", "tcp://127.0.0.1:1"], "Missing argument '-- CMD...'."),
        (["run", "--monitor", "tcp://127.0.0.1:1", "--policy", "lr", "--", "true"], "unrecognized arguments: --policy"),
        (["run", "--monitor", "nowhere", "--", "true"], "'nowhere'"),
        (["run", "--monitor", "tcp://127.0.0.1:1", "--run", "a b", "--", "true"], "--run"),
        (["run", "--monitor", "tcp://127.0.0.1:1", "--config", "none.toml", "--", "true"], "none.toml"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(koopmon: Koopmon, words: list[str], line: str) -> None:
    done = koopmon(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert line in done.stderr


def test_version_and_help_work(koopmon: Koopmon) -> None:
    assert koopmon("--version").stdout == f"koopmon {__version__}\n"
    assert "report" in koopmon("--help").stdout
    assert "--monitor ENDPOINT" in koopmon("run", "--help").stdout


def test_a_job_is_watched_by_a_monitor_that_runs_already(koopmon: Koopmon, python: Path, tmp_path: Path) -> None:
    """The job's words keep their own options; its agent and its adapters need no further package."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "m").mkdir(mode=0o700)
    with ScriptedMonitor(tmp_path / "m") as monitor:
        for launch, dashes in enumerate((["--"], []), start=1):
            done = koopmon("run", "--monitor", monitor.endpoint, "--run", "small", *dashes, str(python), "train.py")
            assert (done.returncode, done.stdout) == (0, "steps: 30 []\n"), done.stderr
            assert "run small: the job starts, and reports to the monitor" in done.stderr
            goodbyes = [message for message in monitor.heard if isinstance(message, Goodbye)]
            assert [message.run for message in goodbyes] == ["small"] * launch
        assert monitor.shards


def test_a_script_attaches_itself(python: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "m").mkdir(mode=0o700)
    with ScriptedMonitor(tmp_path / "m") as monitor:
        words = [str(python), "train.py", monitor.endpoint]
        done = subprocess.run(words, env={}, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "steps: 30 []\n"), done.stderr
        assert {message.run for message in monitor.heard if isinstance(message, Goodbye)} == {"attached"}


def test_a_package_that_another_one_brought_changes_nothing(python: Path, tmp_path: Path) -> None:
    """Libraries for models bring typer and rich, but no web server: the sentence names the first that is missing."""
    link_installed(closure("typer"), tmp_path)
    code = f"import sys; sys.path += [{str(tmp_path)!r}]; from koopmon.cli import main; sys.exit(main(['report']))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("koopmon: koopmon report needs prometheus_client, which is not installed")
