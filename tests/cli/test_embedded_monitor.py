"""`koopmon run` with its own monitor: it starts beside the job, ends after it, and never blocks it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from koopmon.agent.comms.monitor_start import MAX_SECONDS
from koopmon.history.database import take_lock

pytestmark = pytest.mark.process

PYTHON = sys.executable

# Waits for the monitor, and prints the job's view of it: first bytes of the metrics, directory of the endpoint, pid.
LOOK = """
import json, os, pathlib, stat, time, urllib.request
directory = pathlib.Path(os.environ["KOOPMON_ENDPOINT"].removeprefix("ipc://")).parent
early = not (directory / "ready").exists()
end = time.monotonic() + 90
while not (directory / "ready").exists() and time.monotonic() < end:
    time.sleep(0.05)
told = json.loads((directory / "ready").read_text())
page = urllib.request.urlopen("http://" + told["http"] + "/metrics", timeout=10).read()
ready = urllib.request.urlopen("http://" + told["http"] + "/readyz", timeout=10).status
print(json.dumps({
    "directory": str(directory), "mode": stat.S_IMODE(directory.stat().st_mode), "pid": told["pid"],
    "page": b"koopmon_build_info" in page, "ready": ready, "nice": os.getpriority(os.PRIO_PROCESS, told["pid"]),
    "session": os.getsid(told["pid"]) != os.getsid(0), "run": os.environ["KOOPMON_RUN"], "http": told["http"],
    "early": early,
}), flush=True)
"""

# Makes an optimizer, and prints what it found then.
TRAIN = """
import json, os, time, torch
file = os.environ.get("KOOPMON_READY_FILE", "")
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
if os.environ.get("SAY"):
    print("begins", flush=True)
began = time.monotonic()
torch.optim.SGD(model.parameters(), 0.1)
print(json.dumps({"waits": bool(file), "ready": os.path.exists(file), "seconds": time.monotonic() - began}))
"""

# A monitor that never starts: its file is one of another directory.
NO_MONITOR = """
import os, tempfile
os.environ["SAY"] = "1"
os.environ["KOOPMON_READY_FILE"] = os.path.join(tempfile.mkdtemp(dir="."), "ready")
"""

UNTIL_THE_MONITOR_IS_GONE = """
import os, pathlib, time
def monitors():
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().split("\\0")
        except OSError:
            continue
        if os.environ["KOOPMON_ENDPOINT"] in words:
            yield place.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
end = time.monotonic() + 90
while any(monitors()) and time.monotonic() < end:
    time.sleep(0.05)
"""


def gone(pid: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_monitor_starts_beside_the_job_and_is_gone_after_it(koopmon: Any, tmp_path: Path) -> None:
    done = koopmon("run", "--summary", "end.json", "--", PYTHON, "-S", "-c", LOOK + "raise SystemExit(5)")
    assert done.returncode == 5, done.stderr
    seen = json.loads(done.stdout)
    assert seen["early"], "the job must not wait for its monitor"
    assert seen["page"]
    assert seen["ready"] == 200
    assert seen["mode"] == 0o700
    assert seen["session"]
    assert seen["nice"] > os.getpriority(os.PRIO_PROCESS, 0)
    said = done.stderr.decode()
    assert f"http://{seen['http']}/metrics" in said
    assert all(line.startswith("koopmon: ") for line in said.splitlines())
    assert "no training process attached" in said
    assert not alive(seen["pid"])
    assert not Path(seen["directory"]).exists()
    store = tmp_path / "state" / "koopmon" / "runs" / f"{seen['run']}.sqlite3"
    assert store.is_file()
    log = Path(f"{store}-wal")
    assert not log.exists() or log.stat().st_size == 0, "the history must be handed over whole"
    end = json.loads((tmp_path / "end.json").read_text())
    assert (end["run"], end["exit_status"], end["adapter"], end["store"]) == (seen["run"], 5, None, str(store))


def test_a_monitor_that_cannot_start_is_one_line_and_the_job_runs(koopmon: Any, tmp_path: Path) -> None:
    store = tmp_path / "taken.sqlite3"
    with take_lock(store):
        job = (PYTHON, "-S", "-c", UNTIL_THE_MONITOR_IS_GONE + "print('on'); raise SystemExit(4)")
        done = koopmon("run", "--store", str(store), "--", *job)
    assert (done.returncode, done.stdout) == (4, b"on\n")
    unguarded = [line for line in done.stderr.decode().splitlines() if "unguarded" in line]
    assert len(unguarded) == 1
    assert f"store {store}: in use by another monitor" in unguarded[0]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("options", [(), ("--no-wait",)])
def test_a_training_begins_when_its_monitor_serves(koopmon: Any, options: tuple[str, ...]) -> None:
    done = koopmon("run", *options, "--", PYTHON, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["waits"] is (not options)
    assert seen["ready"] or options


def test_a_training_that_waits_begins_if_its_monitor_cannot_start(koopmon: Any, tmp_path: Path) -> None:
    with take_lock(tmp_path / "taken.sqlite3"):
        done = koopmon("run", "--store", "taken.sqlite3", "--", PYTHON, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seconds"] < MAX_SECONDS / 2
    assert "in use by another monitor" in done.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_does_not_wait_for_a_monitor_that_has_ended(koopmon: Any, number: signal.Signals) -> None:
    end = LOOK + f"os.kill(told['pid'], {int(number)})\n" + UNTIL_THE_MONITOR_IS_GONE + TRAIN
    done = koopmon("run", "--", PYTHON, "-c", end)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["waits"]
    assert seen["seconds"] < MAX_SECONDS / 2
    assert done.stderr.decode().count("the monitor died") == 1


def test_a_signal_during_the_wait_ends_the_job(koopmon: Any) -> None:
    process = koopmon.start("run", "--", PYTHON, "-c", NO_MONITOR + TRAIN)
    assert process.stdout.readline() == b"begins\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


def test_a_monitor_that_dies_changes_nothing_for_the_job(koopmon: Any) -> None:
    body = LOOK + f"import signal, time; os.kill(told['pid'], {int(signal.SIGKILL)}); time.sleep(1); print('trained')"
    done = koopmon("run", "--", PYTHON, "-S", "-c", body)
    assert done.returncode == 0
    assert done.stdout.endswith(b"trained\n")
    assert done.stderr.decode().count("the monitor died") == 1


def test_a_signal_ends_job_and_monitor(koopmon: Any) -> None:
    process = koopmon.start("run", "--", PYTHON, "-S", "-c", LOOK + "import time; time.sleep(60)")
    seen = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not alive(seen["pid"])
    assert not Path(seen["directory"]).exists()


def test_the_monitor_does_not_outlive_a_launcher_that_is_killed(koopmon: Any) -> None:
    body = LOOK + "print(os.getpid(), flush=True); import time; time.sleep(60)"
    process = koopmon.start("run", "--", PYTHON, "-S", "-c", body)
    seen, job = json.loads(process.stdout.readline()), int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        assert gone(seen["pid"])
        assert alive(job), "the job is not ours to end"
    finally:
        os.kill(job, signal.SIGKILL)


def test_a_signal_before_the_monitor_is_ready_ends_the_job(koopmon: Any, tmp_path: Path) -> None:
    process = koopmon.start("run", "--summary", "end.json", "--", "sh", "-c", "echo $KOOPMON_ENDPOINT; exec sleep 60")
    directory = Path(process.stdout.readline().decode().strip().removeprefix("ipc://")).parent
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    said = process.stderr.read().decode()
    assert "ended before its monitor was ready" in said
    assert "no training process attached" not in said
    assert json.loads((tmp_path / "end.json").read_text())["exit_status"] == 128 + signal.SIGTERM
    assert not directory.exists()


def test_two_jobs_side_by_side_have_monitors_of_their_own(koopmon: Any) -> None:
    body = LOOK + "import sys; sys.stdin.read()"
    processes = [koopmon.start("run", "--", PYTHON, "-S", "-c", body) for _ in range(2)]
    first, second = (json.loads(process.stdout.readline()) for process in processes)
    for process in processes:
        process.communicate(timeout=60)
    assert all(first[name] != second[name] for name in ("directory", "pid", "run", "http"))


def test_a_second_job_of_the_same_name_is_told_plainly_and_leaves_the_first_its_log(
    koopmon: Any, tmp_path: Path
) -> None:
    body = LOOK + "import sys; sys.stdin.read()"
    first = koopmon.start("run", "--run", "same", "--", PYTHON, "-S", "-c", body)
    page = json.loads(first.stdout.readline())["http"]
    log = tmp_path / "state" / "koopmon" / "runs" / "same.sqlite3.log"
    before = log.read_bytes()
    second = koopmon("run", "--run", "same", "--", PYTHON, "-S", "-c", UNTIL_THE_MONITOR_IS_GONE + "print('on')")
    assert (second.returncode, second.stdout) == (0, b"on\n")
    (unguarded,) = [line for line in second.stderr.decode().splitlines() if "unguarded" in line]
    assert "same.sqlite3: in use by another monitor (pid " in unguarded
    assert f"its page is http://{page}/" in unguarded
    assert before
    assert log.read_bytes().startswith(before)
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_a_state_directory_that_cannot_be_written_is_no_reason_to_stop(koopmon: Any, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a directory")
    done = koopmon("run", "--summary", "end.json", "--", PYTHON, "-S", "-c", LOOK)
    assert done.returncode == 0
    assert "its monitor serves" in done.stderr.decode()
    assert Path(json.loads((tmp_path / "end.json").read_text())["store"]).is_file()


def test_policy_and_dry_run_reach_the_monitor(koopmon: Any, tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_text("[policy]\nact_risk = 0.4\n")
    options = ("--policy", "observe", "--dry-run", "--config", "k.toml", "--store", "history.sqlite3", "--run", "mine")
    body = "import pathlib; pid = %s; print(pathlib.Path(f'/proc/{pid}/cmdline').read_text())"
    done = koopmon("run", *options, "--", PYTHON, "-S", "-c", LOOK + body % "told['pid']")
    words = done.stdout.decode().splitlines()[1].split("\0")
    assert words[words.index("--policy") + 1] == "observe"
    assert words[words.index("--config") + 1] == "k.toml"
    assert "--dry-run" in words
    assert json.loads(done.stdout.splitlines()[0])["run"] == "mine"
    assert (tmp_path / "history.sqlite3").is_file()


def test_the_monitor_verb_serves_until_it_is_told_to_stop(koopmon: Any, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    places = [
        "--bind",
        "tcp://127.0.0.1:*",
        "--http",
        "127.0.0.1:0",
        "--store",
        "m.sqlite3",
        "--ready-file",
        str(ready),
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = koopmon.start("monitor", *places, "--device", "cpu")
        deadline = time.monotonic() + 60
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert re.fullmatch(r"127\.0\.0\.1:\d+", json.loads(ready.read_text())["http"])
        process.send_signal(number)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bind", "tcp://0.0.0.0:9465"], ["tcp://0.0.0.0:9465", "config/koopmon/keys", "keys make"]),
        (["--http", "9464"], ["9464", "HOST:PORT"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--policy", "brake"], ["'brake'", "observe"]),
        (["--store", "/proc/none/m.sqlite3"], ["/proc/none/m.sqlite3"]),
    ],
)
def test_a_mistake_of_the_monitors_is_refused_in_one_line(koopmon: Any, words: list[str], said: list[str]) -> None:
    places = {"--bind": "tcp://127.0.0.1:*", "--http": "127.0.0.1:0", "--store": "m.sqlite3"}
    places |= dict(zip(words[::2], words[1::2], strict=True))
    done = koopmon("monitor", *[word for pair in places.items() for word in pair])
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("koopmon: ")]
    assert done.returncode != 0
    assert len(lines) == 1
    assert "Traceback" not in done.stderr.decode()
    assert all(word in lines[0] for word in said), lines[0]


def test_a_history_of_earlier_launches_is_not_this_jobs(koopmon: Any, tmp_path: Path) -> None:
    words = ("run", "--run", "mine", "--summary", "end.json", "--")
    assert koopmon(*words, PYTHON, "-S", "-c", LOOK).returncode == 0
    assert "store" in json.loads((tmp_path / "end.json").read_text())
    done = koopmon(*words, "sh", "-c", "exit 3")
    assert done.returncode == 3
    assert "was not watched" in done.stderr.decode()
    assert json.loads((tmp_path / "end.json").read_text()) == {"run": "mine", "exit_status": 3}


def test_run_and_help_start_without_torch() -> None:
    body = (
        "import os, sys\n"
        "refused = {'torch', 'numpy', 'matplotlib', 'zmq', 'starlette', 'uvicorn', 'sqlite3'}\n"
        "refused |= {'rich', 'pydantic', 'msgspec'}\n"
        "def check():\n"
        "    found = refused & {name.partition('.')[0] for name in sys.modules}\n"
        "    assert not found, f'imported at start: {found}'\n"
        "from koopmon.cli import main\n"
        "assert main(['--help']) == 0\n"
        "check()\n"
        "refused -= {'rich', 'pydantic', 'msgspec'}\n"
        "for verb in ('run', 'monitor', 'profile', 'demo', 'adapters'):\n"
        "    assert main([verb, '--help']) == 0, verb\n"
        "check()\n"
        "refused.remove('zmq')\n"  # the probe of a monitor is a real handshake
        "status = main(['run', '--monitor', 'tcp://127.0.0.1:1', '--', 'sh', '-c', 'exit 9'])\n"
        "assert status == 9, status\n"
        "check()\n"
        "assert len(os.listdir('/proc/self/task')) == 1, 'the launcher forks: it must have one thread'\n"
    )
    done = subprocess.run([PYTHON, "-c", body], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example: koopmon") == 6
