"""The systemd unit under systemd's checks, and a monitor with its command line and system call filter.

No unit is started, because that needs systemd as the first process.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from koopmon.wire.auth_policy import AuthPolicy
from tests.deploy.conftest import DEPLOY, KOOPMON, Starter, environment, koopmon, parsed, ready, wait_until
from tests.monitor.conftest import ScriptedAgent

httpx = pytest.importorskip("httpx")

UNIT = DEPLOY / "systemd" / "koopmon-monitor.service"

FILTERED = """
import ctypes, errno, os, sys
names, command = sys.argv[1].split(","), sys.argv[2:]
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
ALLOW, REFUSE, EXECUTE_ONLY = 0x7FFF0000, 0x00050000 | errno.EPERM, 2
filter = ctypes.c_void_p(library.seccomp_init(REFUSE))
for name in names:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:  # others are of other processors, or newer than the library
        assert library.seccomp_rule_add(filter, ctypes.c_uint32(ALLOW), number, 0) == 0, name
assert library.seccomp_load(filter) == 0
try:
    os.sched_setaffinity(0, {0})
except PermissionError:
    os.execv(command[0], command)
sys.exit("the filter is not in force")
"""


def settings(text: str) -> Iterator[tuple[str, str]]:
    """Return names and values of a unit file, with long lines joined."""
    for line in text.replace("\\\n", "").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield name, value


def values(name: str) -> list[str]:
    return [value for key, value in settings(UNIT.read_text()) if key == name]


def command_line(**places: str) -> list[str]:
    """Return ExecStart with the unit's environment, and for addresses with the examples of monitor.env."""
    given = dict(word.split("=", 1) for line in values("Environment") for word in line.split())
    examples = dict(re.findall(r"^#(KOOPMON_\w+)=(.*)$", (DEPLOY / "systemd" / "monitor.env").read_text(), re.M))
    assert set(examples) - {"KOOPMON_CONFIG"} <= set(given), "an example that the unit does not read"
    (line,) = values("ExecStart")
    for name, value in {**given, **places}.items():
        line = line.replace(f"${{{name}}}", value)
    assert "$" not in line
    return shlex.split(line)


def allowed_calls() -> set[str]:
    """Return the system calls of the unit's filter, from systemd's tables."""

    def expand(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        listed = subprocess.run(
            ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True, timeout=60
        )
        words = [line.strip() for line in listed.stdout.splitlines()[1:]]
        return {call for word in words if word and not word.startswith("#") for call in expand(word)}

    calls: set[str] = set()
    for line in values("SystemCallFilter"):
        names = {call for name in line.lstrip("~").split() for call in expand(name)}
        calls = calls - names if line.startswith("~") else calls | names
    return calls


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return the unit with an existing program, because the check looks for it."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/koopmon/bin/koopmon", sys.executable))
    return path


@pytest.mark.process
@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("drop_in", ["", "gpu.conf"])
def test_the_unit_is_sound(unit: Path, drop_in: str) -> None:
    if drop_in:
        directory = unit.with_name(f"{unit.name}.d")
        directory.mkdir()
        (directory / drop_in).write_text((DEPLOY / "systemd" / drop_in).read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.process
@pytest.mark.needs("systemd-analyze")
def test_the_unit_exposes_little(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.process
@pytest.mark.needs("systemd-sysusers")
def test_the_user_can_be_made(tmp_path: Path) -> None:
    """Use a private root, not this system."""
    conf = DEPLOY / "systemd" / "koopmon.sysusers.conf"
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(conf)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (user,) = [line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith("koopmon:")]
    assert user.split(":")[5] == "/var/lib/koopmon"
    assert values("User") == values("Group") == ["koopmon"]


def test_the_command_line_is_one() -> None:
    given = parsed(command_line())
    assert given["bind"] == "tcp://127.0.0.1:9465"
    assert given["store"] == Path("/var/lib") / values("StateDirectory")[0] / "monitor.sqlite3"
    assert given["sd_directory"] == Path("/run") / values("RuntimeDirectory")[0] / "targets"


@pytest.mark.process
@pytest.mark.needs("systemd-analyze")
def test_a_monitor_serves_under_the_units_settings(tmp_path: Path, start: Starter) -> None:
    """Use its command line, its umask and its system calls, with keys in its directory."""
    state, runtime = tmp_path / "state", tmp_path / "run"
    state.mkdir(mode=int(values("StateDirectoryMode")[0], 8))
    runtime.mkdir()
    koopmon("keys", "make", "--keys", str(state / "keys"))
    (tmp_path / "koopmon.toml").write_text('[security]\nloopback = "curve"\n')
    anywhere = "tcp://127.0.0.1:0"
    words = command_line(KOOPMON_BIND=anywhere, KOOPMON_BIND_DATA=anywhere, KOOPMON_HTTP="127.0.0.1:0")
    moved = [word.replace("/var/lib/koopmon", str(state)).replace("/run/koopmon", str(runtime)) for word in words]
    moved += ["--ready-file", str(runtime / "ready.json")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(90.0)
        (period,) = values("WatchdogSec")
        process = start(
            [sys.executable, "-c", FILTERED, ",".join(sorted(allowed_calls())), *KOOPMON, *moved[1:]],
            environment(
                KOOPMON_KEYS=str(state / "keys"),
                KOOPMON_CONFIG=str(tmp_path / "koopmon.toml"),
                NOTIFY_SOCKET=str(tmp_path / "notify"),
                WATCHDOG_USEC=f"{period}000000",
            ),
            umask=int(values("UMask")[0], 8),
            cwd=state,
        )
        assert [systemd.recv(100), systemd.recv(100)] == [b"READY=1", b"WATCHDOG=1"]
        assert values("Type") == ["notify"]
        _follow(process, runtime, state)
        assert systemd.recv(100) == b"STOPPING=1"
    assert process.returncode == 0
    assert oct((state / "monitor.sqlite3").stat().st_mode)[-3:] == "600"
    assert list((runtime / "targets").iterdir()) == []


def _follow(process: subprocess.Popen[bytes], runtime: Path, state: Path) -> None:
    """Send a snapshot to the monitor, which Prometheus can find, and stop it."""
    (file,) = (runtime / "targets").iterdir()
    assert [oct(path.stat().st_mode)[-3:] for path in (runtime / "targets", file)] == ["755", "644"]
    told = ready(process, runtime / "ready.json")
    assert [each["targets"] for each in json.loads(file.read_text())] == [[told["http"]]]
    pages = f"http://{told['http']}"
    assert httpx.get(f"{pages}/readyz", timeout=30).text == "ok\n"
    agent = ScriptedAgent(told["endpoint"], trust=AuthPolicy(state / "keys", curve_on_loopback=True))
    try:
        agent.hello()
        agent.snapshot(1)
        wait_until(lambda: "koopmon_dmd_duration_seconds_count 1.0" in httpx.get(f"{pages}/metrics", timeout=30).text)
    finally:
        agent.close()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
