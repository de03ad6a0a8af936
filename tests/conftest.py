"""Common setup of all tests: markers, and hypothesis without deadlines, because no test asserts a speed."""

from __future__ import annotations

import multiprocessing.util
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("koopmon", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("koopmon")

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"
SLOW_SECONDS = 10.0
STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"})
"""Audit events of a new process."""


class Starts:
    """Processes that tests start. A test that starts one, or uses a fixture that did, has the mark `process`."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        """Started processes by the running test."""
        self._setting_up: list[tuple[str, str]] = []
        self._fixtures: dict[tuple[str, str], str] = {}
        sys.addaudithook(self._audit)
        spawn = multiprocessing.util.spawnv_passfds

        def audited(path: bytes, args: list[str], passfds: tuple[int, ...]) -> int:
            self._saw("multiprocessing")  # it calls fork_exec itself and raises no audit event
            return spawn(path, args, passfds)

        multiprocessing.util.spawnv_passfds = audited

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS:
            self._saw(f"{event} {args[0]}" if args else event)

    def _saw(self, what: str) -> None:
        self.seen.append(what)
        for fixture in self._setting_up:
            self._fixtures[fixture] = f"{what} in the fixture {fixture[0]}"

    def by_fixtures(self, item: pytest.Item) -> list[str]:
        """Return the processes of fixtures with a wider scope that the test uses."""
        names = getattr(item, "fixturenames", ())
        return [what for (name, base), what in self._fixtures.items() if name in names and item.nodeid.startswith(base)]

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        self._setting_up.append((fixturedef.argname, fixturedef.baseid))
        try:
            return (yield)
        finally:
            self._setting_up.pop()


STARTED = Starts()
UNMARKED_SLOW: dict[str, float] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(STARTED)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose tool is missing, or fail it under REQUIRE_ALL=1."""
    STARTED.seen.clear()
    for marker in item.iter_markers("needs"):
        (tool,) = marker.args
        if shutil.which(tool) is None:
            if REQUIRE_ALL:
                pytest.fail(f"needs {tool}, which is not installed, and REQUIRE_ALL=1", pytrace=False)
            pytest.skip(f"needs {tool}, which is not installed")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Fail a test that starts a process without the mark: `make unit` starts none."""
    started = [*STARTED.seen, *STARTED.by_fixtures(item)]
    if started and not any(item.get_closest_marker(name) for name in ("process", "distributed")):
        pytest.fail(f"starts a process ({started[0]}): mark it `@pytest.mark.process`", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    _demand_packages(report)
    if call.when == "call" and call.duration > SLOW_SECONDS and not item.get_closest_marker("slow"):
        report.user_properties.append(("unmarked_slow", call.duration))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report: Any = yield
    _demand_packages(report)
    return report


def _demand_packages(report: Any) -> None:
    """Turn skips of `pytest.importorskip` into failures under REQUIRE_ALL=1."""
    reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    if REQUIRE_ALL and "could not import" in reason:
        report.outcome, report.longrepr = "failed", f"{reason}, and REQUIRE_ALL=1"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "unmarked_slow":
            UNMARKED_SLOW[report.nodeid] = value


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report tests that took longer than the limit of `slow`. They do not fail, because machines differ."""
    for nodeid, seconds in UNMARKED_SLOW.items():
        terminalreporter.write_line(f"{nodeid} took {seconds:.0f} s: mark it `slow` if it does on a quiet machine")
