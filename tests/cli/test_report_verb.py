"""`koopmon report` of one real run under `koopmon run`: its files, its data, and its page in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from tests.cli.conftest import CommandLine
from tests.report.recorder import Recorder, guarded

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_prose.py"
TRAIN = f"""
import importlib.util, sys, time
import torch
import torch.nn.functional as F
import koopmon
spec = importlib.util.spec_from_file_location("train_prose", {str(SCRIPT)!r})
prose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prose)
torch.set_num_threads(1)
torch.manual_seed(0)
model = prose.ProseModel()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.008)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
text, picks = prose.read_bytes(), torch.Generator().manual_seed(0)
with koopmon.attach(model, optimizer) as agent:
    end = time.monotonic() + 60
    while not agent.status()["connected"] and time.monotonic() < end:  # the monitor starts beside this short script
        time.sleep(0.05)
    for step in range(40):
        starts = torch.randint(0, len(text) - 65, (6,), generator=picks)
        chunk = torch.stack([text[start : start + 65] for start in starts.tolist()])
        loss = F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        agent.log(loss=loss)
        optimizer.step()
        schedule.step()
"""


class Recorded:
    """A real guarded run, and the result of `koopmon report`."""

    def __init__(self, directory: Path) -> None:
        self.koopmon = CommandLine(directory)
        self.directory = directory
        done = self.koopmon("run", "--run", "prose/1", "--", sys.executable, "-c", TRAIN)
        assert done.returncode == 0, done.stderr.decode()
        self.report = self.koopmon("report", "prose/1", "--out", "seen")
        assert self.report.returncode == 0, self.report.stderr.decode()
        self.page = directory / "seen" / "report.html"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    recorded = Recorded(tmp_path_factory.mktemp("report"))
    yield recorded
    recorded.koopmon.close()


@pytest.mark.process
@pytest.mark.slow
def test_a_real_run_is_told_and_shown(recorded: Recorded) -> None:
    *lines, page = recorded.report.stdout.decode().splitlines()
    assert page == "seen/report.html"
    told = dict(line.split(": ", 1) for line in lines)
    # The last snapshot, of step 39 unless the monitor was too busy for a snapshot of every step.
    assert re.fullmatch(r"ended, last seen at step 3\d", told["State"])
    assert told["Risk"].startswith("0.40 or more from step")
    assert told["LR scale"].startswith("down to")
    assert [path.name for path in recorded.page.parent.iterdir()] == ["report.html"]
    text = recorded.page.read_text(encoding="utf-8")
    assert all(value in text for value in told.values())
    assert "transformer, 4 layers, width 128" in text


@pytest.mark.process
@pytest.mark.slow
def test_the_same_facts_as_data(recorded: Recorded) -> None:
    done = recorded.koopmon("report", "prose/1", "--json")
    told = json.loads(done.stdout)
    assert told["run"] == "prose/1"
    assert told["state"] == "ended"
    assert told["summary"]["num_backoffs"] >= 1
    assert len(told["points"]) == told["summary"]["num_snapshots"] > 30
    assert all(point["loss"] > 0 for point in told["points"][2:])
    brakes = [action for each in told["decisions"] for action in each["commands"] if action["effect"]]
    assert brakes[0]["outcome"] == "applied"
    assert brakes[0]["delay_steps"] >= 0
    assert told["spectra"][0]["name"] == "calm"
    assert len(told["spectra"][0]["eigenvalues"]) == 4
    assert told["launches"][0]["hello"]["adapter"] == "transformer"
    assert told["agent"]["num_heartbeats"] >= 1
    assert not (recorded.directory / "koopmon-report-prose_1").exists(), "data alone writes no files"


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.needs("chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (375, "light"), (375, "dark")])
def test_the_page_in_a_browser(recorded: Recorded, width: int, scheme: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        view.on("console", lambda message: said.append(message.text))
        view.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        view.goto(recorded.page.as_uri())
        found = Axe().run(view)
        assert found.violations_count == 0, found.generate_report()
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        drawn = view.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
        assert drawn == [True] * 8, "four heatmaps with their scales"
        assert said == []
        view.emulate_media(media="print")
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", (
            "paper is white"
        )
        assert set(asked) <= {"file", "data"}
        browser.close()


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with the histories of two guarded runs and of a shared monitor."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("runs/team,one", "runs/two", "monitor"):
        path = tmp_path / "koopmon" / f"{name}.sqlite3"
        path.parent.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(path, {"runs/team,one": "team/one", "runs/two": "two", "monitor": "shared"}[name])
        guarded(recorder).close()
    return tmp_path


@pytest.mark.parametrize("run", ["team/one", "two", "shared"])
def test_it_finds_the_run_wherever_it_was_kept(state_home: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", run]) == 0
    page = state_home / f"koopmon-report-{run.replace('/', ',')}" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page.relative_to(state_home))
    assert "down to 0.5 by 1 back-off, first at step 42" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("opens", "says"), [(True, ""), (False, "--open: no browser was found; the page is ")])
def test_open_shows_the_page_in_a_browser(
    state_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, opens: bool, says: str
) -> None:
    asked: list[str] = []

    def browser(address: str) -> bool:
        asked.append(address)
        return opens

    monkeypatch.setattr("webbrowser.open", browser)
    assert main(["report", "two", "--open"]) == 0
    page = state_home / "koopmon-report-two" / "report.html"
    assert asked == [page.as_uri()]
    assert says in capsys.readouterr().err
    assert page.is_file()


def test_open_beside_json_writes_the_page(
    state_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    assert main(["report", "two", "--open", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "two"
    assert (state_home / "koopmon-report-two" / "report.html").is_file()


def test_the_latest_run_is_named(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    assert capsys.readouterr().out.startswith("Run: shared\n")


def test_the_configuration_says_what_is_high(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state_home / "k.toml").write_text("[policy]\nact_risk = 0.9\nsevere_risk = 0.95\n")
    assert main(["report", "two", "--config", "k.toml", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["act_risk"], told["episodes"]) == (0.9, [])


@pytest.mark.process
def test_a_plain_install_without_matplotlib_is_enough(state_home: Path) -> None:
    """The verb in a process in which matplotlib cannot be imported."""
    body = "import sys; sys.modules['matplotlib'] = None; from koopmon.cli import main; sys.exit(main(sys.argv[1:]))"
    # -P: the working directory has a folder named koopmon, the one of the histories.
    words = [sys.executable, "-P", "-c", body, "report", "two", "--out", "bare"]
    done = subprocess.run(words, cwd=state_home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (state_home / "bare").iterdir()] == ["report.html"]


def test_a_run_that_goes_on_is_read_beside_its_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(tmp_path / "h.sqlite3")
    recorder.hello()
    recorder.saw(1, 0.1, 3.0, profiled=True)
    recorder.store.commit()
    recorder.saw(2, 0.9, 3.0)  # an open transaction
    assert main(["report", recorder.run, "--store", str(recorder.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["summary"]["last_step"]) == ("running", 1)
    recorder.saw(3, 0.9, 3.0)
    recorder.close()
    assert main(["report", recorder.run, "--store", str(recorder.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"][0]["first_step"] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["twoo"], "run 'twoo': not in 3 histories under the state directory; did you mean two?"),
        (["xyz", "--store", "koopmon/monitor.sqlite3"], "not in koopmon/monitor.sqlite3; the last ones are shared"),
        (["two", "--store", "none.sqlite3"], "store none.sqlite3: no such file"),
        (["two", "--store", "text"], "store text: file is not a database"),
        (["two", "--config", "none.toml"], "none.toml: cannot be read"),
        (["two", "--out", "text/x"], "--out text/x: cannot be written: Not a directory"),
    ],
)
def test_bad_input_is_one_line(
    state_home: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (state_home / "text").write_text("no database\n" * 200)
    assert main(["report", *words]) in (1, 2)
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_what_a_peer_says_does_not_reach_the_terminal_as_it_is(
    state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(state_home / "h.sqlite3")
    recorder.hello()
    recorder.saw(1, 0.9)
    recorder.did(1, 0.9, "refused", lr_scale=0.5, detail="\x1b[2J")
    recorder.close()
    assert main(["report", recorder.run, "--store", str(recorder.path), "--out", "x"]) == 0
    told = capsys.readouterr().out
    assert "Not applied: 1 command; the first: refused (?[2J)" in told
    assert "\x1b" not in told


def test_nothing_recorded_yet_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["report", "mine"]) == 2
    assert capsys.readouterr().err == (
        "koopmon: run 'mine': no history of any run is known; `koopmon run -- CMD...` records one, and --store names"
        " another file\n"
    )


PLAIN = """
import sys, time, torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(
    nn.Embedding(16, 32),
    nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True), 3),
    nn.Linear(32, 16),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(60):
    tokens = torch.randint(16, (8, 12))
    total = 0.0
    for part in tokens.chunk(2):
        loss = nn.functional.cross_entropy(model(part).flatten(0, 1), part.flatten()) / 2
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    optimizer.zero_grad()
    print(total, float(norm), flush=True)
    time.sleep(0.1)
"""
"""A script without a word of koopmon, which prints its loss and gradient norm."""


@pytest.mark.process
@pytest.mark.slow
def test_an_unchanged_script_has_its_loss_and_gradient_norm_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    koopmon = CommandLine(tmp_path)
    done = koopmon("run", "--run", "plain", "--", sys.executable, "plain.py")
    assert done.returncode == 0, done.stderr.decode()
    own = [tuple(map(float, line.split())) for line in done.stdout.decode().splitlines()]
    report = koopmon("report", "plain", "--json")
    assert report.returncode == 0, report.stderr.decode()
    data = json.loads(report.stdout)
    assert len(data["points"]) >= 3
    for point in data["points"]:
        assert (point["loss"], point["grad_norm"]) == pytest.approx(own[point["step"]], rel=1e-5), point
        assert point["learning_rate"] == pytest.approx(1e-3)
