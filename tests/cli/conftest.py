"""The command line in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.scripted_monitor import ScriptedMonitor

KOOPMON = (sys.executable, "-m", "koopmon")


class CommandLine:
    """Start koopmon verbs with a private state directory and without the caller's KOOPMON_ variables."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(("KOOPMON_", "SLURM_"))}
        for name in ("PYTHONPATH", "WORLD_SIZE", "RANK"):
            self.environ.pop(name, None)
        self.environ |= {"XDG_STATE_HOME": str(directory / "state"), "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
        self.environ["XDG_CONFIG_HOME"] = str(directory / "config")
        self.environ |= {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
        self._monitor: ScriptedMonitor | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*KOOPMON, *words],
            env=self.environ | env,
            cwd=self.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Tests that a shell runs in the background inherit that this signal is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._started.append(process)
        return process

    def __call__(self, *words: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
        process = self.start(*words, **env)
        stdout, stderr = process.communicate(given, timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def run(self, *job: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
        """Run `koopmon run` of a job beside a stub of a monitor: the launcher alone."""
        return self("run", "--monitor", self.endpoint, "--", *job, given=given, **env)

    def python(self, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
        """A script without koopmon."""
        command, environ = [sys.executable, *words], self.environ | env
        return subprocess.run(command, env=environ, cwd=self.directory, capture_output=True, timeout=120, check=True)

    @property
    def endpoint(self) -> str:
        """Endpoint of a stub of a monitor, which replies to probes only."""
        if self._monitor is None:
            place = self.directory / "m"
            place.mkdir(mode=0o700)
            self._monitor = ScriptedMonitor(place)
            self._monitor.__enter__()
        return self._monitor.endpoint

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.__exit__()
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def koopmon(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path)
    yield command_line
    command_line.close()


@pytest.fixture
def one_line() -> object:
    """Require that a verb refused with one line: (process, words of the line, exit status)."""

    def check(done: subprocess.CompletedProcess[bytes], *words: str, status: int = 2) -> None:
        text = done.stderr.decode()
        assert done.returncode == status, text
        assert text.startswith("koopmon: "), text
        assert text.count("\n") == 1, text
        for word in words:
            assert word in text, text
        assert done.stdout == b""

    return check
