"""Runner for the commands of a page, with its own directory, home and ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.docs.pages import ROOT, blocks
from tests.docs.spelling import words_of

PORTS = ("9464", "9465", "9466")
SEARCH_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
COMMAND_SECONDS = 180.0
READY_SECONDS = 90.0
STOP_SECONDS = 70.0


class Reader:
    """Runs commands one after another. `koopmon monitor` runs beside the others until `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("KOOPMON_", "SLURM_", "XDG_"))}
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(name, None)
        # The commands use this checkout, not an installed koopmon.
        paths = [str(ROOT), str(ROOT / "plugins"), str(directory)]
        self.environ = kept | {
            "HOME": str(directory),
            "PATH": SEARCH_PATH,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "PET_MASTER_PORT": str(_free_ports(1)[0]),
            "COLUMNS": "200",
            "TERM": "dumb",
            "NO_COLOR": "1",
        }
        self._kept = ""
        self._monitors: list[tuple[subprocess.Popen[bytes], Path]] = []

    def files_of(self, *pages: Path) -> None:
        """Write the files that the pages show. A later page replaces files of an earlier one."""
        for block in (block for page in pages for block in blocks(page) if block.is_file):
            path = self.directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")

    def type(self, command: str, **env: str) -> str:
        """Run one command to its end and return its output. Raises AssertionError if it failed."""
        text = self._moved(command)
        if words_of(text)[:2] == ["koopmon", "monitor"]:
            return self._keep_monitor(words_of(text), env)
        if re.match(r"(export|cd)\s", text):
            self._kept += f"{text}\n"
            return ""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._kept + text],
            cwd=self.directory,
            env=self.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\nended with status {done.returncode}:\n{done.stdout[-4000:]}"
        return done.stdout

    def close(self) -> None:
        """Stop the monitors, which must exit with status 0."""
        for process, log in self._monitors:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            assert status == 0, f"the monitor ended with status {status}:\n{log.read_text(errors='replace')[-4000:]}"
        self._monitors = []

    def _moved(self, command: str) -> str:
        """Replace the documented ports, which may be in use."""
        for documented, ours in self.ports.items():
            command = re.sub(rf"\b{documented}\b", str(ours), command)
        return command

    def _keep_monitor(self, words: list[str], env: Mapping[str, str]) -> str:
        if "--bind" not in words:
            words += ["--bind", f"tcp://127.0.0.1:{self.ports['9465']}"]
        if "--http" not in words:
            words += ["--http", f"127.0.0.1:{self.ports['9464']}"]
        log = self.directory / f"monitor-{len(self._monitors)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                cwd=self.directory,
                env=self.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._monitors.append((process, log))
        address = words[words.index("--http") + 1]
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(f"http://{address}/readyz"):
            assert process.poll() is None, f"{words}\nended at once:\n{log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"{words}\nis not ready after {READY_SECONDS:.0f} s"
            time.sleep(0.2)
        assert _answers(f"http://{address}/healthz")
        return log.read_text(errors="replace")


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
