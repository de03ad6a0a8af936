"""`koopmon run` as a launcher without an effect on the job. No monitor runs in these tests."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from koopmon.errors import NOT_WATCHED

pytestmark = pytest.mark.process

PYTHON = sys.executable
Refused = Callable[..., None]


def test_the_jobs_bytes_are_its_own(koopmon: Any) -> None:
    body = (
        "import sys, os\n"
        "data = bytes(range(256)) * 300\n"
        "os.write(1, data[:70000]); os.write(2, data[::-1][:70000]); sys.stdin.buffer.read()\n"
    )
    data = bytes(range(256)) * 300
    done = koopmon.run(PYTHON, "-c", body)
    assert done.stdout == data[:70000]
    before, _, after = done.stderr.partition(data[::-1][:70000])
    for mine in (before, after):
        assert mine.startswith(b"koopmon: run python")
        assert mine.count(b"\n") == 1


def test_the_job_reads_our_standard_input(koopmon: Any) -> None:
    assert koopmon.run("cat", given=b"\x00\xff\n").stdout == b"\x00\xff\n"


@pytest.mark.parametrize("status", [0, 1, 3, 127, 255])
def test_the_exit_status_is_the_jobs(koopmon: Any, status: int) -> None:
    assert koopmon.run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_job_killed_by_a_signal_gives_128_and_its_number(koopmon: Any, number: signal.Signals) -> None:
    assert koopmon.run("sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number


def test_options_after_the_command_are_the_jobs(koopmon: Any) -> None:
    done = koopmon("run", "--monitor", koopmon.endpoint, "echo", "--policy", "--", "-x")
    assert done.stdout == b"--policy -- -x\n"


RECORDER = """
import signal, sys, time
seen = []
for number in (1, 2, 10, 12, 14, 15):
    signal.signal(number, lambda number, _: seen.append(number))
print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and 15 not in seen:
    time.sleep(0.01)
time.sleep(0.2)
print(seen, flush=True)
sys.exit(7)
"""


def test_every_signal_reaches_the_job_once(koopmon: Any) -> None:
    process = koopmon.start("run", "--quiet", "--monitor", koopmon.endpoint, "--", PYTHON, "-S", "-c", RECORDER)
    assert process.stdout.readline() == b"[]\n", "the job must not inherit a blocked mask"
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.15)
    stdout, stderr = process.communicate(timeout=60)
    assert stdout == b"[1, 2, 10, 12, 14, 15]\n"
    assert stderr.count(b"\n") == stderr.count(b"NOT WATCHED") == 1
    assert process.returncode == 7


def test_a_key_of_the_terminal_reaches_the_job_once(koopmon: Any) -> None:
    body = RECORDER.replace("15 not in seen", "2 not in seen")
    words = [PYTHON, "-m", "koopmon", "run", "-q", "--monitor", koopmon.endpoint, "--", PYTHON, "-S", "-c", body]
    terminal, theirs = pty.openpty()
    job = subprocess.Popen(
        words,
        env=koopmon.environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    with os.fdopen(terminal, "rb+", buffering=0) as keyboard:
        assert keyboard.readline().strip() == b"[]"
        keyboard.write(b"\x03")
        text = b""
        while b"]" not in text:
            text += keyboard.read(100)
        assert text.strip().endswith(b"[2]")
        assert job.wait(60) == 7


def test_the_environment_of_the_job(koopmon: Any) -> None:
    body = "import json, os; print(json.dumps(dict(os.environ)))"
    (koopmon.directory / "k.toml").write_text("[policy]\nname = 'lr'\n")
    done = koopmon(
        "run",
        "--monitor",
        koopmon.endpoint,
        "--config",
        "k.toml",
        "--",
        PYTHON,
        "-S",
        "-c",
        body,
        PYTHONPATH="/a:/b",
    )
    environ = json.loads(done.stdout)
    assert environ["KOOPMON_ENDPOINT"] == koopmon.endpoint
    assert environ["KOOPMON_CONFIG"] == str(koopmon.directory / "k.toml")
    name, _, token = environ["KOOPMON_RUN"].rpartition("-")
    assert name.startswith("python")
    assert len(bytes.fromhex(token)) == 4
    first, rest = environ["PYTHONPATH"].split(os.pathsep, 1)
    assert Path(first, "sitecustomize.py").is_file()
    assert rest == "/a:/b"


def test_a_named_run_keeps_its_name(koopmon: Any) -> None:
    words = ("run", "--monitor", koopmon.endpoint)
    job = ("--", "sh", "-c", "echo $KOOPMON_RUN")
    assert koopmon(*words, "--run", "mine/7", *job).stdout == b"mine/7\n"
    assert koopmon(*words, *job, KOOPMON_RUN="theirs").stdout == b"theirs\n"


def test_on_more_than_one_node_the_agents_agree_on_the_name(koopmon: Any) -> None:
    done = koopmon.run("sh", "-c", "echo [$KOOPMON_RUN]", SLURM_NNODES="2")
    assert done.stdout == b"[]\n"


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:1", "tcp://[::1]:1", "ipc:///tmp/koopmon-nobody-is-here/control"]
)
def test_an_absent_monitor_is_one_line_and_the_job_runs(koopmon: Any, endpoint: str) -> None:
    done = koopmon("run", "--monitor", endpoint, "--", "echo", "on")
    assert (done.returncode, done.stdout) == (0, b"on\n")
    assert re.match(
        rf"koopmon: run echo-[0-9a-f]{{8}}: no monitor answers at {re.escape(endpoint)}", done.stderr.decode()
    )
    assert done.stderr.count(b"\n") == 1


def test_a_job_that_cannot_be_started_is_one_line(koopmon: Any, one_line: Refused, tmp_path: Path) -> None:
    one_line(koopmon.run("no-such-program"), "no-such-program", "not found", status=127)
    plain = tmp_path / "plain"
    plain.write_text("")
    one_line(koopmon.run(str(plain)), str(plain), "Permission denied", status=126)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "brake", "--", "true"], ["--policy", "'brake'", "lr, kss, kss+lr, observe"]),
        (["--run", "-x y", "--", "true"], ["--run", "'-x y'", "letters"]),
        (
            ["--monitor", "tcp://10.0.0.1:9465", "--", "true"],
            ["tcp://10.0.0.1:9465", "config/koopmon/keys", "keys make"],
        ),
        (["--monitor", "nonsense", "--", "true"], ["nonsense"]),
        (["--monitor", "tcp://127.0.0.1:1", "--policy", "lr", "--", "true"], ["--policy", "koopmon monitor"]),
        (["--monitor", "tcp://127.0.0.1:1", "--dry-run", "--", "true"], ["--dry-run", "koopmon monitor"]),
        (["--monitor", "tcp://127.0.0.1:1", "--store", "x", "--", "true"], ["--store", "koopmon monitor"]),
        (["--keys", "k", "--", "true"], ["--keys", "--monitor"]),
        (["--insecure-plaintext-tcp", "--", "true"], ["--insecure-plaintext-tcp", "--monitor"]),
        (["--config", "missing.toml", "--", "true"], ["missing.toml"]),
        (["--", "torchrun", "--nnodes", "2", "train.py"], ["--nnodes 2", "--monitor"]),
        (["--no-such-option", "--", "true"], ["--no-such-option"]),
        (["--http", "9464", "--", "true"], ["'9464'", "HOST:PORT"]),
        (["--http", "127.0.0.1:99999", "--", "true"], ["'127.0.0.1:99999'", "HOST:PORT"]),
        (["--http", "0.0.0.0:0", "--", "true"], ["'0.0.0.0:0'", "other hosts reach it"]),
        (["--store", "/proc/none/x.sqlite3", "--", "true"], ["--store /proc/none/x.sqlite3"]),
        (["--store", "/proc/x.sqlite3", "--", "true"], ["--store /proc/x.sqlite3"]),
        (["--store", "/", "--", "true"], ["--store /", "a directory"]),
        (["--store", "/etc/passwd", "--", "true"], ["/etc/passwd"]),
        (["--summary", "/nodir/x.json", "--", "true"], ["--summary /nodir/x.json", "No such file"]),
        (["--summary", "/", "--", "true"], ["--summary /", "a directory"]),
        (["--allow-stop", "--policy", "observe", "--", "true"], ["--allow-stop", "observe"]),
        (["--monitor", "tcp://127.0.0.1:1", "--no-wait", "--", "true"], ["--no-wait", "the job's own monitor"]),
        (["--monitor", "tcp://127.0.0.1:1", "--allow-stop", "--", "true"], ["--allow-stop", "[policy] stop"]),
    ],
)
def test_a_mistake_is_refused_in_one_line(koopmon: Any, one_line: Refused, words: list[str], said: list[str]) -> None:
    one_line(koopmon("run", *words), *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sampling]\nnum_samples = 3\n", ["sampling.num_samples", "3", "16"]),
        ("[policy]\nname = 'brake'\n", ["policy.name", "'brake'"]),
        ("[nonsense]\n", ["nonsense"]),
        ("[sampling\n", ["not valid TOML"]),
    ],
)
def test_a_malformed_configuration_is_refused_in_one_line(
    koopmon: Any, one_line: Refused, text: str, said: list[str]
) -> None:
    (koopmon.directory / "bad.toml").write_text(text)
    one_line(koopmon("run", "--config", "bad.toml", "--", "true"), "bad.toml", *said)


def test_nothing_is_left_running_when_the_job_is(koopmon: Any) -> None:
    done = koopmon.run("sh", "-c", "echo $PPID")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.parametrize(
    ("job", "hint"),
    [("echo on", "without quotes"), ("A=1", "set variables before"), ("no-such-program", "command not found\n")],
)
def test_a_command_that_does_not_exist_starts_no_monitor(koopmon: Any, one_line: Refused, job: str, hint: str) -> None:
    one_line(koopmon("run", "--", job), job, "command not found", hint, status=127)
    assert not (koopmon.directory / "state").exists(), "no history of it remains"


def test_a_port_that_is_taken_is_refused_before_the_job_starts(koopmon: Any, one_line: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        one_line(koopmon("run", "--http", address, "--", "echo", "on"), address, "in use")


def test_a_line_for_a_closed_standard_error_is_left_out(koopmon: Any) -> None:
    launcher = [
        sys.executable,
        "-m",
        "koopmon",
        "run",
        "--monitor",
        koopmon.endpoint,
        "--run",
        "mine",
        "--",
        "echo",
        "on",
    ]
    done = koopmon.python("-c", f"import os; os.close(2); os.execv({sys.executable!r}, {launcher})")
    assert done.stdout == b"on\n", "standard output is the job's"


def test_a_shared_monitor_has_a_first_and_a_last_line(koopmon: Any) -> None:
    done = koopmon("run", "--monitor", koopmon.endpoint, "--run", "mine", "--", "true")
    first, last = done.stderr.decode().splitlines()
    assert first == f"koopmon: run mine: the job starts, and reports to the monitor at {koopmon.endpoint}"
    assert last == f"koopmon: run mine: {NOT_WATCHED}"
    assert "PYTHONPATH" in last
