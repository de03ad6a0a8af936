"""The command line as a whole: version, quiet and verbose, completion, --json, and light imports."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import koopmon
from koopmon.cli import VERBS, console, main
from koopmon.cli.app import make_app
from koopmon.history.writer import HistoryWriter
from manual.command_line import verbs
from tests.cli.conftest import KOOPMON, CommandLine
from tests.factories import observation, record_observation

WITHOUT_JSON = {
    "koopmon": "has verbs only",
    "koopmon run": "standard output belongs to the job",
    "koopmon monitor": "serves until it is stopped",
    "koopmon export": "--format json",
    "koopmon keys": "has verbs only",
    "koopmon grafana": "has verbs only",
}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # "koopmon" here would hide the package
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("alpha-1", "beta-2"):
        path = tmp_path / "state" / "koopmon" / "runs" / f"{name}.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        store = HistoryWriter.open(path)
        for step in range(10):
            seen = observation(step, update_ratios=(0.5, 0.5), near_unit_mass=0.9)
            record_observation(store, step + 5.0 * (name == "beta-2"), step, name, "0123abcd", observation=seen)
        store.record_state(20.0 + 5.0 * (name == "beta-2"), name, "0123abcd", 0, end_reason="goodbye")
        store.close()
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield tmp_path
    console.set_verbosity("normal")
    root.setLevel(level)
    root.handlers[:] = handlers


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"koopmon {koopmon.__version__}\n"


@pytest.mark.parametrize(("name", "command"), list(verbs()), ids=lambda value: str(value)[:30])
def test_json_means_the_same_everywhere(name: str, command: Any) -> None:
    options = [parameter for parameter in command.params if "--json" in parameter.opts]
    assert bool(options) is (name not in WITHOUT_JSON), name
    assert all(option.is_flag and option.help == "Print the result as JSON." for option in options)


@pytest.mark.parametrize(("words", "messages"), [([], True), (["-q"], False), (["--quiet"], False)])
def test_quiet_leaves_messages_out(
    state: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: bool
) -> None:
    assert main([*words, "export", "alpha-1", "--out", "x.csv"]) == 0
    assert capsys.readouterr().err == ("koopmon: run alpha-1: snapshots written to x.csv\n" if messages else "")


def test_quiet_leaves_errors_in(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "report", "nobody"]) == 2
    assert capsys.readouterr().err.startswith("koopmon: run 'nobody'")


@pytest.mark.parametrize(("words", "level"), [(["-v"], "DEBUG"), (["-q"], "WARNING"), ([], "INFO")])
def test_the_level_of_the_log(state: Path, words: list[str], level: str) -> None:
    assert main([*words, "runs"]) == 0
    console.configure_logging()
    assert logging.getLevelName(logging.getLogger().level) == level


def test_quiet_and_verbose_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "-v", "runs"]) == 2
    assert "--quiet and --verbose contradict each other" in capsys.readouterr().err


def completed(command_line: CommandLine, line: str, shell: str, **env: str) -> list[str]:
    words = line.split(" ")
    known = (
        {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if shell == "bash" else {"_TYPER_COMPLETE_ARGS": line}
    )
    known |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    done = command_line(**known, _KOOPMON_COMPLETE=f"complete_{shell}", **env)
    assert done.stderr == b"", done.stderr
    return done.stdout.decode().splitlines()


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_verbs_options_and_run_names(state: Path, koopmon: CommandLine, shell: str) -> None:
    def found(line: str) -> str:
        return "\n".join(completed(koopmon, line, shell, XDG_STATE_HOME=str(state / "state")))

    assert "report" in found("koopmon re")
    # Which names a verb has does not depend on the shell.
    for verb in ("report", "replay", "export", "compare", "runs rm") if shell == "bash" else ("report",):
        names = found(f"koopmon {verb} ")
        assert names.index("beta-2") < names.index("alpha-1"), "the latest run is the first"
        assert "beta-2" not in found(f"koopmon {verb} al")
    assert "--older-than" in found("koopmon runs prune --o")


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(koopmon: CommandLine, shell: str) -> None:
    done = koopmon("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert b"_KOOPMON_COMPLETE" in done.stdout


LIGHT = """
import sys
from koopmon.cli import main
status = main(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
assert not loaded, f"{sys.argv[2:]} loads {loaded}"
sys.exit(status)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], "torch,numpy,zmq,rich.console,sqlite3,jinja2,typer"),
        (["--version"], "torch,numpy,zmq,rich.console,sqlite3,jinja2"),
        (["runs"], "torch,numpy,zmq,jinja2"),
        (["runs", "--json"], "torch,numpy,zmq,jinja2,rich.console"),
        (["runs", "prune", "--yes"], "torch,numpy,zmq,jinja2"),
        (["runs", "rm", "alpha-1"], "torch,numpy,zmq,jinja2"),
        (["report", "--json"], "torch,zmq,matplotlib"),
        (["replay"], "torch,zmq,jinja2"),
        (["compare", "alpha-1", "beta-2"], "torch,numpy,zmq,jinja2"),
        (["export"], "torch,numpy,zmq,jinja2,pyarrow,pandas,rich.console"),
        (["keys", "--help"], "torch,numpy,zmq"),
        (["grafana", "export", "out"], "torch,numpy,zmq,grafana_client"),
        (["run", "--help"], "torch,numpy,zmq,sqlite3"),
        (["monitor", "--help"], "torch,numpy,zmq,sqlite3"),
        (["profile", "--help"], "torch,numpy,zmq,sqlite3,matplotlib"),
        (["calibrate", "--help"], "torch,numpy,zmq,sqlite3,matplotlib"),
        (["doctor", "--help"], "torch,numpy,zmq,sqlite3"),
        (["demo", "--help"], "torch,numpy,zmq,sqlite3,matplotlib"),
        (["adapters", "--help"], "torch,numpy,zmq,sqlite3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_verb_imports_only_what_it_needs(state: Path, words: list[str], absent: str) -> None:
    # -P: the working directory has a folder named koopmon, the one of the histories.
    command = [sys.executable, "-P", "-c", LIGHT, absent, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", [20, 52, 70, 80, 200])
def test_the_help_without_typer_is_that_of_typer(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    make_app([])(args=["--help"], prog_name="koopmon", standalone_mode=False)
    wanted = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * wanted


def test_every_verb_is_in_the_list_of_imports() -> None:
    (mark,) = [
        mark
        for mark in test_a_verb_imports_only_what_it_needs.pytestmark
        if mark.name == "parametrize"  # type: ignore[attr-defined]
    ]
    assert {words[0] for words, _ in mark.args[1]} >= set(VERBS)


@pytest.mark.parametrize("words", [["report"], ["report", "--json"], ["replay"], ["export"]])
def test_no_history_at_all_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # "koopmon" here would hide the package
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith("koopmon: no history of any run is known; `koopmon run -- CMD...` records one")
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.parametrize("verb", ["report", "replay", "export"])
def test_the_latest_run_is_the_default(state: Path, capfdbinary: pytest.CaptureFixture[bytes], verb: str) -> None:
    words = ["--format", "json"] if verb == "export" else ["--json"]
    assert main([verb, *words]) == 0
    told = json.loads(capfdbinary.readouterr().out)
    assert (told[0] if verb == "export" else told)["run"] == "beta-2"
    assert main([verb, *words, "--store", str(state / "state" / "koopmon" / "runs" / "alpha-1.sqlite3")]) == 0
    told = json.loads(capfdbinary.readouterr().out)
    assert (told[0] if verb == "export" else told)["run"] == "alpha-1"


def test_what_a_peer_or_a_file_says_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn("the monitor refuses: \x1b[2J\nkoopmon: all is well\u202e")
    assert capsys.readouterr().err == "koopmon: the monitor refuses: ?[2J?koopmon: all is well?\n"


@pytest.mark.process
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("adapters", "--json"), ("keys", "--help")])
def test_a_full_disk_behind_standard_output_is_one_line(koopmon: CommandLine, words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*KOOPMON, *words], env=koopmon.environ, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"koopmon: standard output cannot be written: No space left on device\n"
