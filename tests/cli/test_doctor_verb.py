"""`koopmon doctor`: each fault with real monitors, sockets and processes, and a setup without faults."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from koopmon.cli.live_monitors import announce
from koopmon.doctor import http_checks
from koopmon.wire.codec import encode
from koopmon.wire.messages import Applied, Heartbeat, HeartbeatReply, ProbeReply, TrainingStep
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.keyring import Keyring
from tests.monitor.conftest import MonitorProcess, ScriptedAgent, wait_until
from tests.report.recorder import Recorder
from tests.wire.test_probe import OLDER, answering

pytestmark = pytest.mark.process

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)
    def forward(self, x):
        return x + self.f(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

def good():
    return Model(), torch.randn(2, 16, 8)

def chainless():
    return nn.Linear(8, 8), torch.randn(2, 8)

def wrong_batch():
    return Model(), torch.randn(2, 16, 5)
"""
Examine = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private directory, without the variables of the caller, and a torchrun of this Python on PATH."""
    for name in list(os.environ):
        if name.startswith("KOOPMON_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f"#!{sys.executable}\n")
    torchrun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(FACTORY)
    return tmp_path


@pytest.fixture
def examine(here: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run the doctor; return its exit status and its findings by check."""

    def run(*words: str) -> tuple[int, dict[str, dict[str, str]]]:
        status = main(["doctor", *words, "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] == (status == 0)
        assert status == (3 if any(each["level"] == "fail" for each in told["findings"]) else 0)
        assert all(bool(each["fix"]) == (each["level"] != "ok") for each in told["findings"]), "a fix for each trouble"
        return status, {each["check"]: each for each in told["findings"]}

    return run


@pytest.fixture(scope="module")
def monitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitorProcess]:
    directory = tmp_path_factory.mktemp("monitor")
    process = MonitorProcess({"policy": {"name": "observe"}}, directory / "h.sqlite3", "tcp://127.0.0.1:0", directory)
    yield process
    process.process.terminate()
    process.process.wait()


@pytest.fixture
def connect() -> Iterator[Callable[..., ScriptedAgent]]:
    agents: list[ScriptedAgent] = []

    def start(endpoint: str, **options: Any) -> ScriptedAgent:
        agents.append(ScriptedAgent(endpoint, **options))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


def at(monitor: MonitorProcess) -> tuple[str, ...]:
    return "--monitor", monitor.addresses.endpoint, "--http", f"http://{monitor.addresses.http}"


def test_all_is_well_and_the_monitor_does_not_notice(
    monitor: MonitorProcess, connect: Callable[..., ScriptedAgent], examine: Examine, here: Path
) -> None:
    agent = connect(monitor.addresses.endpoint, run="well")
    agent.hello()
    agent.snapshot(3)
    wait_until(lambda: monitor.sample('near_unit_mass{layer="0",run="well"}') is not None)
    (here / "k.toml").write_text("[policy]\nname = 'lr'\n")
    before = monitor.samples()
    status, found = examine(*at(monitor), "--run", "well", "--config", "k.toml", "models.py:good")
    assert {each["level"] for each in found.values()} == {"ok"}, found
    assert status == 0
    assert monitor.samples() == before
    with monitor.history() as history:
        assert history.runs() == ["well"]
    assert "well running" in found["pages"]["found"]
    assert "1 received" in found["snapshots"]["found"]
    assert "3 blocks, blocks.0 to blocks.2" in found["taps"]["found"]
    assert set(found) == {
        *("config", "endpoint", "keys", "monitor", "versions", "data endpoint", "clock", "pages", "run", "snapshots"),
        *("auto-attach", "torch", "launcher", "environment", "store", "taps"),
    }


def test_for_people_each_trouble_stands_beside_its_fix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--monitor", "tcp://127.0.0.1:1"]) == 3
    told = capsys.readouterr().out
    assert "fail  monitor" in told
    assert "→ start one: koopmon monitor --bind tcp://127.0.0.1:1" in told
    assert told.rstrip().endswith("1 failed, 0 warnings")


def test_nobody_is_named_and_nobody_is_there(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koopmon.doctor.connection.DEFAULT", "tcp://127.0.0.1:1")
    status, found = examine()
    assert status == 0, "`koopmon run` would bring a monitor of its own"
    assert found["endpoint"]["level"] == found["monitor"]["level"] == "warn"
    assert "koopmon run" in found["endpoint"]["fix"]


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("nonsense", "expected tcp://HOST:PORT"),
        ("tcp://10.0.0.1", "expected tcp"),
        ("tcp://10.0.0.1:9465", "no such file"),
    ],
)
def test_an_endpoint_that_cannot_be_used(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, endpoint: str, says: str
) -> None:
    monkeypatch.setenv("KOOPMON_ENDPOINT", endpoint)
    status, found = examine()
    assert status == 3
    assert says in found.get("keys", found["endpoint"])["found"]
    assert "monitor" not in found, "nobody was asked"


def test_what_listens_is_a_server_of_pages(examine: Examine) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello\n")

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        where = f"127.0.0.1:{server.server_port}"
        _, found = examine("--monitor", f"tcp://{where}", "--http", f"http://{where}")
        server.shutdown()
        thread.join(10.0)
    assert found["monitor"]["level"] == found["pages"]["level"] == "fail"
    assert "does not use koopmon's protocol" in found["monitor"]["found"]
    assert "is not a koopmon monitor's" in found["pages"]["found"]


def test_another_protocol_version(examine: Examine) -> None:
    with answering(OLDER + b"\x80") as endpoint:
        _, found = examine("--monitor", endpoint)
    assert found["versions"]["level"] == "fail"
    assert "upgrade koopmon on the peer's side" in found["versions"]["found"]


def test_another_package_and_another_clock_are_worth_a_word(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir(mode=0o700)
    with ScriptedMonitor(tmp_path / "m", koopmon_version="9.9", clock_offset_seconds=-100.0) as scripted:
        status, found = examine("--monitor", scripted.endpoint)
    assert status == 0
    assert found["versions"]["level"] == found["clock"]["level"] == "warn"
    assert "9.9 there" in found["versions"]["found"]
    assert "100 s behind the local clock" in found["clock"]["found"]
    assert "expire by optimizer steps" in found["clock"]["fix"]


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """Keys of the monitor, of an agent with some runs, and of an unknown agent."""
    ring = Keyring(tmp_path_factory.mktemp("keys") / "ring")
    ring.agent(runs=("mine*",))
    ring.agent("unknown", served=False)
    return ring


@pytest.fixture(scope="module")
def locked(ring: Keyring, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitorProcess]:
    directory = tmp_path_factory.mktemp("locked")
    process = MonitorProcess({"security": ring.security()}, directory / "h.sqlite3", "tcp://127.0.0.1:0", directory)
    yield process
    process.process.terminate()
    process.process.wait()


@pytest.mark.parametrize(
    ("trouble", "check", "says", "fix"),
    [
        ("missing", "keys", "no such file", "koopmon keys make"),
        ("loose", "keys", "lets others read it; chmod 600", "koopmon keys make"),
        ("unknown", "monitor", "does not know this agent's key", "copy {keys}/unknown.key to agents/unknown.key"),
        ("other monitor", "monitor", "its key is not the one in monitor.key", "copy monitor.key"),
        ("not for this run", "run", "may not use run yours", "add the run to `runs` in the agent's file"),
        ("no keys here", "monitor", "it demands keys", 'loopback = "curve"'),
    ],
)
def test_keys(
    examine: Examine,
    locked: MonitorProcess,
    ring: Keyring,
    tmp_path: Path,
    trouble: str,
    check: str,
    says: str,
    fix: str,
) -> None:
    if trouble in ("missing", "loose", "other monitor"):
        ring = Keyring(tmp_path / "ring")
    if trouble in ("loose", "other monitor"):
        ring.agent()
    if trouble == "loose":
        (ring.place / "agent.secret").chmod(0o644)
    agent = "unknown" if trouble == "unknown" else "agent"
    tables = "" if trouble == "no keys here" else f'keys = "{ring.place}"\nagent = "{agent}"\nloopback = "curve"\n'
    (tmp_path / "k.toml").write_text(f"[security]\n{tables}")
    status, found = examine("--monitor", locked.addresses.endpoint, "--config", "k.toml", "--run", "yours")
    assert status == 3
    assert found[check]["level"] == "fail"
    assert says in found[check]["found"]
    assert fix.format(keys=ring.place) in found[check]["fix"]


def test_behind_keys_all_is_well_too(examine: Examine, locked: MonitorProcess, ring: Keyring, tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_text(f'[security]\nkeys = "{ring.place}"\nloopback = "curve"\n')
    before = locked.samples()
    status, found = examine("--monitor", locked.addresses.endpoint, "--config", "k.toml")
    assert (status, {each["level"] for each in found.values()}) == (0, {"ok"})
    assert "agent 'agent' has its secret" in found["keys"]["found"]
    assert locked.samples() == before, "a real handshake is no refused one"


def test_a_broken_configuration_is_one_finding_and_the_rest_goes_on(examine: Examine, here: Path) -> None:
    (here / "bad.toml").write_text("[sampling]\nnum_samples = 3\n")
    status, found = examine("--config", "bad.toml", "--monitor", "tcp://127.0.0.1:1")
    assert status == 3
    assert "sampling.num_samples = 3" in found["config"]["found"]
    assert found["auto-attach"]["level"] == "ok"


@pytest.mark.parametrize(
    ("flags", "says", "fix"),
    [
        ("-I", "it ignores PYTHONPATH (isolated, ignore_environment)", "without -I"),
        ("-I -S", "has no koopmon", "-m pip install koopmon"),
    ],
)
def test_a_python_that_does_not_attach(examine: Examine, here: Path, flags: str, says: str, fix: str) -> None:
    wrapper = here / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {flags} "$@"\n')
    wrapper.chmod(0o755)
    status, found = examine("--monitor", "tcp://127.0.0.1:1", "--python", str(wrapper))
    assert status == 3
    assert says in found["auto-attach"]["found"]
    assert fix in found["auto-attach"]["fix"]


@pytest.mark.parametrize("program", ["no-such-python", "/bin/echo"])
def test_what_is_no_python(examine: Examine, program: str) -> None:
    _, found = examine("--monitor", "tcp://127.0.0.1:1", "--python", program)
    assert found["auto-attach"]["level"] == "fail"


def test_a_torchrun_of_another_python(examine: Examine, here: Path) -> None:
    (here / "bin" / "torchrun").write_text("#!/opt/other/bin/python3\n")
    _, found = examine("--monitor", "tcp://127.0.0.1:1")
    assert found["launcher"]["level"] == "warn"
    assert "belongs to /opt/other/bin/python3" in found["launcher"]["found"]


@pytest.mark.parametrize(
    ("variables", "level", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "fail", "RANK='x': not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "fail", "RANK 2 in a WORLD_SIZE of 2"),
        ({"RANK": "0"}, "warn", "WORLD_SIZE is missing"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "ok", "rank 1 of 2"),
        ({"LOCAL_RANK": "0"}, "ok", "no rank is set"),
        ({"KOOPMON_ATTACHED_PID": "1"}, "fail", "KOOPMON_ATTACHED_PID is set"),
    ],
)
def test_the_environment(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], level: str, says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, found = examine("--monitor", "tcp://127.0.0.1:1")
    assert found["environment"]["level"] == level
    assert says in found["environment"]["found"]


def test_a_run_name_that_is_taken(
    monitor: MonitorProcess,
    connect: Callable[..., ScriptedAgent],
    examine: Examine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect(monitor.addresses.endpoint, run="taken").hello()
    monkeypatch.setenv("KOOPMON_RUN", "taken")
    status, found = examine(*at(monitor))
    assert status == 0
    assert "is running already" in found["run name"]["found"]
    monkeypatch.setenv("KOOPMON_RUN", "free")
    assert examine(*at(monitor))[1]["run name"]["level"] == "ok"


def test_a_state_directory_that_cannot_be_written(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/state")
    status, found = examine("--monitor", "tcp://127.0.0.1:1")
    assert status == 3
    assert found["store"]["level"] == "fail"


def test_what_the_monitor_knows_of_a_run(
    monitor: MonitorProcess,
    connect: Callable[..., ScriptedAgent],
    examine: Examine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = monitor.addresses.endpoint
    _, found = examine(*at(monitor), "--run", "never")
    assert found["run"]["level"] == "fail"
    assert "the monitor does not know it" in found["run"]["found"]
    agent = connect(endpoint, run="mute")
    agent.hello()
    name = {"run": "mute", "incarnation": "aaaaaaaa", "process_rank": 0}
    agent.send(
        Heartbeat(
            **name,
            training=TrainingStep(step=5),
            applied=Applied(),
            dropped={"monitor_away": 3, "budget": 1},
            taps_missing=2,
        )
    )
    agent.expect(HeartbeatReply)
    _, found = examine(*at(monitor), "--run", "mute")
    assert found["run"]["found"] == "mute: running, last step 5"
    assert found["snapshots"]["level"] == "fail"
    assert "none received; dropped: 3 monitor_away, 1 budget" in found["snapshots"]["found"]
    assert "the ranks do not reach the data endpoint" in found["snapshots"]["fix"]
    assert "in 2 snapshots a tap did not fire" in found["taps"]["found"]
    agent.snapshot(6)
    wait_until(lambda: monitor.sample('snapshots_received_total{run="mute"}'))
    monkeypatch.setattr(http_checks, "STALE_SECONDS", -1.0)
    _, found = examine(*at(monitor), "--run", "mute")
    assert found["snapshots"]["level"] == "warn"
    agent.goodbye()
    wait_until(lambda: monitor.sample('run_state{run="mute",state="ended"}') == 1.0)
    assert "mute: ended" in examine(*at(monitor), "--run", "mute")[1]["run"]["found"]
    connect(endpoint, run="lost", incarnation="bbbbbbbb").hello()
    connect(endpoint, run="lost", incarnation="cccccccc").hello()
    connect(endpoint, run="lost", incarnation="bbbbbbbb").hello()
    _, found = examine(*at(monitor), "--run", "lost")
    assert "hello is refused: run 'lost' was taken over" in found["run"]["found"]
    assert "a different name for each job" in found["run"]["fix"]


def test_what_a_peer_says_does_not_reach_the_terminal_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = ProbeReply(
        run="mine",
        incarnation="0" * 8,
        koopmon_version="\x1b[2J",
        torch_version="0",
        time=0.0,
        data_endpoint="tcp://127.0.0.1:1",
        refused="\x1b]0;mine\x07[red]no[/red]",
    )
    with answering(bytes(encode(hostile)[0])) as endpoint:
        assert main(["doctor", "--monitor", endpoint, "--run", "mine"]) == 3
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\x07" not in told
    assert "[red]no[/red]" in told


def test_a_run_is_not_known_when_nobody_answers(examine: Examine) -> None:
    _, found = examine("--monitor", "tcp://127.0.0.1:1", "--run", "mine")
    assert found["run"]["level"] == "warn"
    assert "no monitor answered" in found["run"]["found"]


def test_pages_behind_a_login(examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("a-secret-of-the-pages\n")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "m").mkdir()
    tables = {"http": {"token_file": str(tmp_path / "token")}}
    process = MonitorProcess(tables, tmp_path / "m" / "h.sqlite3", "tcp://127.0.0.1:0", tmp_path / "m")
    try:
        _, found = examine(*at(process))
        assert found["pages"]["level"] == "warn"
        assert "KOOPMON_HTTP_TOKEN" in found["pages"]["fix"]
        monkeypatch.setenv("KOOPMON_HTTP_TOKEN", "a-secret-of-the-pages")
        assert examine(*at(process))[1]["pages"]["level"] == "ok"
    finally:
        process.process.kill()
        process.process.wait()


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("models.py:chainless", "adapter"),
        ("models.py:wrong_batch", "the forward pass raised RuntimeError"),
        ("models.py:none", "has no function none"),
        ("models.py", "expected module:function or file.py:function"),
    ],
)
def test_a_model_that_cannot_be_tapped(examine: Examine, factory: str, says: str) -> None:
    status, found = examine("--monitor", "tcp://127.0.0.1:1", factory)
    assert status == 3
    assert found["taps"]["level"] == "fail"
    assert says in found["taps"]["found"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--http", "ftp://x"], "--http 'ftp://x': expected http://HOST:PORT"),
        (["--http", "http://x:99999"], "expected http://HOST:PORT"),
        (["--run", "-x y"], "--run '-x y'"),
        (["--no-such"], "--no-such"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["doctor", "--monitor", "tcp://127.0.0.1:1", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.process
def test_a_run_with_a_monitor_of_its_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("KOOPMON_ENDPOINT", "KOOPMON_RUN", "KOOPMON_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "koopmon" / "runs" / "mine.sqlite3"
    path.parent.mkdir(parents=True)
    recorder = Recorder(path, "mine")
    recorder.hello()
    recorder.ended()
    recorder.close()

    def finding(run: str) -> tuple[str, str]:
        main(["doctor", "--run", run, "--json"])
        (found,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["check"] == "run"]
        return found["level"], found["found"]

    assert finding("mine") == ("ok", f"mine: ended; its history is {path}")
    assert finding("other")[0] != "ok"
    live = announce("other", "http://127.0.0.1:1/", tmp_path / "h.sqlite3")
    assert live is not None
    assert finding("other") == ("ok", "other: running, with a monitor of its own at http://127.0.0.1:1/")
    live.close()
