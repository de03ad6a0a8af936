"""The file with the settings in force: read by the next launch, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.optim import SGD, Optimizer

from koopmon.agent.control.kept_settings import VARIABLE, KeptSettings, _Kept, _Process
from koopmon.wire.messages import Applied, Hello, KssSettings
from tests.agent.models import batch, build, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor

MAX_PID = 1 << 22
BACKED_OFF = Applied(lr_scale=0.25, max_rate=0.02, peak_rate=0.1, kss=KssSettings(alpha=0.5))


def kept(directory: Path, run: str = "team/one", rank: int = 0) -> KeptSettings:
    return KeptSettings(str(directory), run, rank)


def test_what_was_in_force_is_read_by_every_rank_of_the_next_launch(tmp_path: Path) -> None:
    kept(tmp_path).keep(BACKED_OFF)
    assert [kept(tmp_path, rank=rank).read() for rank in range(2)] == [BACKED_OFF] * 2
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert kept(tmp_path, "team_one").read() is None, "names that differ share no settings"


def test_a_calm_run_writes_no_file_and_a_return_to_the_users_values_removes_it(tmp_path: Path) -> None:
    settings = kept(tmp_path)
    settings.keep(Applied())
    assert not list(tmp_path.iterdir())
    settings.keep(BACKED_OFF)
    settings.keep(Applied())
    assert not list(tmp_path.iterdir())


def test_a_return_to_the_users_values_removes_what_an_earlier_launch_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept(tmp_path).keep(BACKED_OFF)
    settings = kept(tmp_path)
    found = [settings.in_force]
    settings.read()
    found.append(settings.in_force)
    settings.keep(Applied())
    assert [*found, settings.in_force] == [False, True, False]
    assert not list(tmp_path.iterdir())
    settings.keep(BACKED_OFF)
    (tmp_path / "team,one.settings").unlink()
    settings.keep(Applied())
    assert not caplog.records, "a file that is gone already"


def test_only_rank_0_writes(tmp_path: Path) -> None:
    kept(tmp_path, rank=1).keep(BACKED_OFF)
    assert not list(tmp_path.iterdir())


def test_a_training_that_ends_leaves_nothing_and_one_without_a_step_leaves_what_it_got(tmp_path: Path) -> None:
    kept(tmp_path).keep(BACKED_OFF)
    second = kept(tmp_path)
    assert second.read() == BACKED_OFF
    second.clear()
    third = kept(tmp_path)
    assert third.read() == BACKED_OFF
    third.keep(BACKED_OFF)
    third.clear()
    assert kept(tmp_path).read() is None


def test_a_training_that_ends_sets_its_settings_aside_until_the_next_one_begins(tmp_path: Path) -> None:
    settings, ended = kept(tmp_path), tmp_path / "team,one.ended"
    settings.clear()
    assert not ended.exists(), "it took no step"
    settings.keep(BACKED_OFF)
    written = (tmp_path / "team,one.settings").read_bytes()
    kept(tmp_path, rank=1).clear()
    settings.clear()
    assert ended.read_bytes() == written
    assert [each.name for each in tmp_path.iterdir()] == [ended.name]
    kept(tmp_path, rank=1).read()
    assert ended.exists(), "only rank 0 writes"
    assert kept(tmp_path).read() is None
    assert not ended.exists()
    calm = kept(tmp_path)
    calm.keep(Applied())
    calm.clear()
    assert not list(tmp_path.iterdir()), "a calm training leaves nothing"


def test_a_training_that_raised_leaves_what_was_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = kept(tmp_path)
    settings.keep(BACKED_OFF)
    monkeypatch.setattr(sys, "last_value", RuntimeError(), raising=False)
    settings.clear()
    assert kept(tmp_path).read() == BACKED_OFF
    later = kept(tmp_path)
    later.keep(BACKED_OFF)
    later.keep(Applied())
    later.keep(BACKED_OFF)
    later.clear()
    assert kept(tmp_path).read() is None, "an exception before, as in a cell of a notebook, is not this training's"


def test_two_trainings_of_one_name_at_a_time_share_no_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = kept(tmp_path)
    settings.keep(BACKED_OFF)
    file = tmp_path / "team,one.settings"
    written = file.read_bytes()
    # The parent of this process stands for another training that goes on.
    other = msgspec.json.encode(_Kept("team/one", BACKED_OFF, _Process.of(os.getppid())))
    file.write_bytes(other)
    beside = kept(tmp_path)
    assert beside.read() is None
    for applied in (Applied(lr_scale=0.5), Applied()):
        beside.keep(applied)
    beside.clear()
    late = kept(tmp_path)
    late.keep(Applied(lr_scale=0.5))
    assert file.read_bytes() == other
    assert [f"goes on in process {os.getppid()}" in each.getMessage() for each in caplog.records] == [True] * 2
    file.write_bytes(written.replace(f"[{os.getpid()},".encode(), f"[{MAX_PID},".encode()))
    assert kept(tmp_path).read() == BACKED_OFF, "of a process that is gone"


@pytest.mark.process
def test_the_other_ranks_of_a_job_read_what_their_own_rank_0_wrote(tmp_path: Path) -> None:
    file = tmp_path / "team,one.settings"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        child = _Process.of(process.pid)
        assert child is not None
        assert child.parent == os.getpid()
        for parent, found in ((os.getppid(), BACKED_OFF), (os.getpid(), None)):
            writer = _Process(child.pid, child.started, parent)
            file.write_bytes(msgspec.json.encode(_Kept("team/one", BACKED_OFF, writer)))
            file.chmod(0o600)
            assert kept(tmp_path, rank=1).read() == found
            assert kept(tmp_path).read() is None
        process.communicate(b"\n")
    assert kept(tmp_path).read() == BACKED_OFF


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"run":"team/one","applied":{"lr_scale":0.2',
        b'{"run":"team/one","applied":{"lr_scale":2.0}}',
        b'{"run":"team/one","applied":{"lr_scale":0.2,"more":1}}',
        b'{"run":"team/one","applied":{"max_rate":NaN}}',
        b" " * 5000,
    ],
)
def test_a_bad_file_is_ignored_with_one_line(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "team,one.settings"
    file.write_bytes(text)
    file.chmod(0o600)
    assert kept(tmp_path).read() is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "team,one.settings is ignored" in caplog.text


def test_a_file_that_others_can_read_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(tmp_path).keep(BACKED_OFF)
    (tmp_path / "team,one.settings").chmod(0o644)
    assert kept(tmp_path).read() is None
    assert "chmod 600" in caplog.text


def test_a_link_is_not_followed_and_a_directory_that_is_gone_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    target.write_text(json.dumps({"run": "team/one", "applied": {"lr_scale": 0.5}}))
    (tmp_path / "team,one.settings").symlink_to(target)
    assert kept(tmp_path).read() is None
    settings = kept(tmp_path / "gone")
    settings.keep(BACKED_OFF)
    settings.keep(BACKED_OFF)
    assert len(caplog.records) == 2


WRITER = """
import sys
from koopmon.agent.control.kept_settings import KeptSettings
from koopmon.wire.messages import Applied
settings = KeptSettings(sys.argv[1], "one", 0)
for count in range(10_000_000):
    settings.keep(Applied(lr_scale=0.5, max_rate=1.0 + count % 1000))
    if count == 0:
        print("writes", flush=True)
"""


@pytest.mark.process
def test_no_reader_sees_half_a_file_and_a_kill_leaves_a_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == b"writes\n"
        found = [kept(tmp_path, "one")._content() for _ in range(2000)]
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert all(each is not None and each.applied.lr_scale == 0.5 for each in found)
    assert kept(tmp_path, "one").read() is not None
    assert not caplog.records


def test_the_first_step_of_a_restarted_launch_has_what_was_in_force(
    tmp_path: Path, agents: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    in_force = Applied(lr_scale=0.5, max_rate=0.1, peak_rate=0.4, warmup_done=1, warmup_steps=4)
    kept(tmp_path, "one").keep(in_force)
    caplog.set_level(logging.INFO, "koopmon.agent")
    rates: list[float] = []

    class Probe(SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with ScriptedMonitor(tmp_path / "m", restore=Applied(lr_scale=1.0, max_rate=0.3)) as monitor:
        model = build()
        optimizer = Probe(model.parameters(), lr=0.2)
        agent = agents(model, optimizer, endpoint=monitor.endpoint, run="one")
        assert "learning rate x 0.5, peak rate at most 0.1" in caplog.text
        monitor.wait(lambda: agent.status()["connected"])
        assert monitor.of(Hello)[0].applied == in_force
        rates.clear()  # those of the check of the optimizer
        for step in range(4):
            loss_of(model, batch(step)).backward()
            optimizer.step()
        # A quarter of the peak's 0.4 is a scale of 0.25; the second of four steps of the warm-up gives half of it.
        assert rates == pytest.approx([0.2 * 0.25 * warm for warm in (0.5, 0.75, 1.0, 1.0)])
        assert kept(tmp_path, "one").read() == Applied(lr_scale=0.5, max_rate=0.1, peak_rate=0.4)
        agent.close()
    assert kept(tmp_path, "one").read() is None, "it said goodbye"


def test_the_first_step_of_a_restarted_launch_has_the_bounds_on_single_groups(
    tmp_path: Path, agents: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    in_force = Applied(max_rate=0.1, peak_rate=0.1, rate_shares={1: 0.5})
    kept(tmp_path, "one").keep(in_force)
    caplog.set_level(logging.INFO, "koopmon.agent")
    rates: list[list[float]] = []

    class Probe(SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    with ScriptedMonitor(tmp_path / "m") as monitor:
        model = build()
        weights = list(model.parameters())
        optimizer = Probe([{"params": weights[:-1]}, {"params": weights[-1:], "lr": 3.0}], lr=0.1)
        agent = agents(model, optimizer, endpoint=monitor.endpoint, run="one")
        assert "peak rate at most 0.1, parameter groups with a bound on their rate: 1" in caplog.text
        monitor.wait(lambda: agent.status()["connected"])
        assert monitor.of(Hello)[0].applied == in_force
        rates.clear()  # those of the check of the optimizer
        for step in range(3):
            loss_of(model, batch(step)).backward()
            optimizer.step()
        assert rates == [pytest.approx([0.1, 0.05])] * 3
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 3.0]
        assert kept(tmp_path, "one").read() == in_force
        agent.close()


def test_the_settings_of_an_optimizer_that_wraps_another_are_kept_at_every_step(
    tmp_path: Path, agents: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrapper(Optimizer):
        inner: Optimizer

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with ScriptedMonitor(tmp_path / "m") as monitor:
        model = build()
        inner = SGD(model.parameters(), lr=0.2)
        optimizer = Wrapper(inner.param_groups, inner.defaults)
        agent = agents(model, [optimizer, inner], endpoint=monitor.endpoint, run="one")
        optimizer.inner = inner  # under `koopmon run`, its constructor attached it before it held this

        def step() -> float | None:
            loss_of(model, batch(0)).backward()
            optimizer.step()
            found = kept(tmp_path, "one").read()
            return None if found is None else found.lr_scale

        step()
        monitor.wait(lambda: agent.status()["connected"])
        monitor.command("set_lr_scale", "one", lr_scale=0.25, ramp_steps=2)
        end = time.monotonic() + 30.0
        while (first := step()) is None:
            assert time.monotonic() < end, "no command arrived"
        assert [first, step(), step()] == pytest.approx([0.5, 0.25, 0.25])


def test_keeping_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    settings = kept(tmp_path)
    seconds = []
    for count in range(200):
        started = time.perf_counter()
        settings.keep(Applied(lr_scale=0.5, max_rate=1.0 + count))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1e-3
