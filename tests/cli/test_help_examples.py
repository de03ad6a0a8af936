"""Each --help ends with an example, and a test runs it as it is written, beside its files.

NOT_RUN has the examples that cannot run, with their replacements. Their words are parsed.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from koopmon.cli import main
from koopmon.history.reader import HistoryReader
from manual.command_line import EXAMPLE, example, verbs
from tests.cli.test_calibrate_verb import Recorder
from tests.docs.pages import QUICKSTART, ROOT
from tests.docs.reader import Reader
from tests.docs.spelling import koopmon_words, parse
from tests.report.recorder import Recorder as RunRecorder
from tests.report.recorder import guarded

VERBS = dict(verbs())
EXAMPLES = {name: example(command) for name, command in VERBS.items()}
RUN = "train-1a2b3c4d"
"""Name of the recorded run in the examples: that of the example of `koopmon run`."""
NOT_RUN = {
    "koopmon": "is that of `koopmon run` with other words; a page's test runs it",
    "koopmon demo": "takes minutes; tests/test_demo.py runs a slice of it",
    "koopmon runs prune": "deletes old histories of other examples; tests/cli/test_runs_verb.py runs it",
    "koopmon grafana push": "needs a Grafana; tests/grafana drives it against a small one",
}
HISTORY = f".local/state/koopmon/runs/{RUN}.sqlite3"
BEFORE = {
    "koopmon doctor": [
        "koopmon monitor",
        f"koopmon run --monitor tcp://127.0.0.1:9465 --run {RUN} -- python train.py --steps 20",
    ],
    "koopmon keys": ["koopmon keys make monitor"],
    "koopmon keys show": ["koopmon keys make"],
    "koopmon keys rotate": ["koopmon keys make"],
}
"""Commands before an example."""
DUE = [name for name in VERBS if name not in NOT_RUN and name != "koopmon run"]
"""Commands before the others: the example of `koopmon run` comes first."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Directory of a user with a script, a policy, a plugin package, many short runs and some longer ones."""
    directory = tmp_path_factory.mktemp("reader")
    reader = Reader(directory)
    reader.files_of(QUICKSTART, ROOT / "docs" / "tuning.md")
    _install_plugin(directory)
    reader.type(EXAMPLES["koopmon run"], KOOPMON_RUN=RUN)
    _record_runs(directory / ".local" / "state" / "koopmon" / "runs" / "many.sqlite3")
    for name in ("old-9c0d1e2f", "good-1a2b3c4d", "bad-5e6f7a8b"):
        guarded(RunRecorder(directory / ".local" / "state" / "koopmon" / "runs" / f"{name}.sqlite3", name)).close()
    yield reader
    reader.close()


def _install_plugin(directory: Path) -> None:
    """The example package of docs/write-an-adapter.md, with the name in the example."""
    shutil.copytree(ROOT / "tests" / "packages" / "echo" / "koopmon_echo", directory / "mypackage")
    adapter = directory / "mypackage" / "adapter.py"
    adapter.write_text(adapter.read_text(encoding="utf-8").replace("koopmon_echo", "mypackage"), encoding="utf-8")
    told = directory / "mypackage-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n", encoding="utf-8")
    (told / "entry_points.txt").write_text("[koopmon.adapters]\necho = mypackage.adapter\n", encoding="utf-8")


def _record_runs(path: Path) -> None:
    """Write sixty short runs of two widths, of which those at high rates diverge."""
    draw, recorder = random.Random(0), Recorder(path)
    for index in range(60):
        log_rate = draw.uniform(-4, -1)
        dies = draw.random() < 1 / (1 + math.exp(-6 * (log_rate + 2.5)))
        recorder.run(10**log_rate, diverges=dies, width=(8, 12)[index % 2])
    recorder.store.close()


@pytest.mark.parametrize("name", VERBS)
def test_help_ends_with_an_example_that_the_parser_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert VERBS[name].epilog, f"{name} --help has no example"
    assert EXAMPLES[name].startswith(name), f"{name}: its epilog is {VERBS[name].epilog!r}"
    words = koopmon_words(EXAMPLES[name])
    assert words is not None
    parse(words)
    assert main([*name.split()[1:], "--help"]) == 0
    assert EXAMPLE.strip() in capsys.readouterr().out


def test_what_is_not_run_says_why_and_is_few() -> None:
    assert all(len(why) > 20 for why in NOT_RUN.values())
    assert len(DUE) > len(VERBS) / 2


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", DUE)
def test_the_example_works(name: str, prepared: Reader, tmp_path: Path) -> None:
    env = {"KOOPMON_KEYS": str(tmp_path / "keys")} if name.startswith("koopmon keys") else {}
    for command in [*BEFORE.get(name, []), EXAMPLES[name]]:
        prepared.type(command, **env)
    prepared.close()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_example_of_run_works(prepared: Reader) -> None:
    with HistoryReader.open(prepared.directory / HISTORY) as history:
        assert list(history.observations(RUN))
