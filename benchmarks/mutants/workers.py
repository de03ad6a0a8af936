"""Forked workers: each applies one mutant to a prepared interpreter and runs the tests that reach it.

torch is imported once, in the parent. For each group of modules a child imports koopmon, collects the tests, and learns
which lines each test reaches, one fork per test. Then each mutant gets a fork of that child: the code of the changed
function is put in place of the old one, and the tests that reach it run until one fails. A mutant of code that runs at
import gets a fork of the parent instead, which imports the changed module and collects the tests again.
"""

from __future__ import annotations

import ast
import gc
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NoReturn

import pytest

from benchmarks.mutants.operators import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
MARKS = "not process and not distributed and not slow and not science"
"""Tests of `make unit`; the others start processes, which would run the code as it is on disk."""

KILLED, SURVIVED, TIMEOUT, BROKEN = 0, 3, 4, 5
"""Exit statuses of a worker. BROKEN: the worker itself failed; the run ends."""

MEMORY_BYTES = 6 * 1024**3
"""Address space that a mutant may add: a loop that grows a list ends here instead of taking the machine down."""


TRACED_CALLS = 5000
"""Calls of one function that one test is traced for: the lines of a loop show in the first ones."""


@dataclass(frozen=True)
class Verdict:
    """Result for one mutant."""

    module: str
    name: str
    status: int
    killer: str
    """The failed test; empty where none did."""


@dataclass(frozen=True)
class Source:
    """A module with the mutants to try. A fork applies one of them to its own copy of the tree."""

    module: str
    tree: ast.Module
    mutants: list[Mutant]

    def compiled(self, mutant: Mutant) -> CodeType:
        """Apply one mutant and compile the module; once in a process, because the tree stays changed."""
        mutant.apply()
        return compile(ast.fix_missing_locations(self.tree), str(ROOT / self.module), "exec")


def read_source(module: str) -> Source:
    """Parse a module and list all its mutants."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    return Source(module, tree, mutants(tree))


def try_group(sources: Sequence[Source], tests: Sequence[str], jobs: int) -> list[Verdict]:
    """Try mutants against tests, files or folders; koopmon must not be imported yet."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        out = Path(folder)
        pid = _fork(lambda: _collect(tests, out, _Session(sources, out, jobs)))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            raise RuntimeError(f"{', '.join(tests)}: the tests do not pass or cannot be collected")
        verdicts = [Verdict(**one) for one in json.loads((out / "verdicts.json").read_text())]
        import_plan = json.loads((out / "import.json").read_text())
        tasks: list[_Task] = []
        for source in sources:
            limit, order, seconds = import_plan[source.module]
            tasks += [
                _Task(source.module, mutant, order, seconds, limit, _importing(source, mutant, out))
                for mutant in source.mutants
                if mutant.scope is None
            ]
        return verdicts + list(_try_all(tasks, jobs, out))


# Of one mutant


@dataclass(frozen=True)
class _Task:
    module: str
    mutant: Mutant
    tests: list[str]
    """Names of the tests that reach the mutant, fastest first."""
    seconds: dict[str, float]
    """Seconds on the clock that each test takes without a mutant."""
    limit: float
    """Seconds of CPU time for all of them; twice as many on the clock, and half a minute."""
    work: Callable[[list[str], Path], None]
    """Runs in the fork with the tests in order. It writes the name of each test to the file before it runs."""

    @property
    def places(self) -> tuple[object, object]:
        """The statement and the function of the mutant."""
        return (self.module, self.mutant.lines), (self.module, self.mutant.scope)

    def overdue(self, said: Path, slowness: float = 1.0) -> bool:
        """True if the test that runs takes far longer than without a mutant, as a wait without an end does."""
        try:
            name, started = said.read_text(), said.stat().st_mtime  # in this order: the file may change in between
        except FileNotFoundError:
            return False
        return time.time() - started > slowness * (20.0 + 10.0 * self.seconds.get(name, math.inf))


def _try_all(tasks: Sequence[_Task], jobs: int, out: Path) -> Iterator[Verdict]:
    """Run each task in a fork, `jobs` at a time. Tests that killed other mutants of the function come first."""
    merits: dict[tuple[object, str], float] = defaultdict(float)
    """For a statement or a function and a test, the kills, weighted by how fast they were."""
    waiting = list(reversed(tasks))
    running: dict[int, tuple[_Task, int, float, Path]] = {}
    number = 0
    done = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            if not task.tests:
                done += 1
                yield Verdict(task.module, task.mutant.name, SURVIVED, "")
                continue
            order = sorted(task.tests, key=lambda name: -sum(merits[place, name] for place in task.places))
            number += 1
            said = out / f"killer-{number}"
            pid = _fork(lambda task=task, order=order, said=said: _limited(task, order, said))  # type: ignore[misc]
            running[os.pidfd_open(pid)] = (task, pid, time.monotonic(), said)
        ready, _, _ = select.select(list(running), [], [], 1.0)
        # Other processes on the machine slow the tests down.
        slowness = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
        late = [
            fd
            for fd, (task, _, started, said) in running.items()
            if time.monotonic() - started > slowness * (30.0 + 2.0 * task.limit) or task.overdue(said, slowness)
        ]
        for fd in [*ready, *late]:
            if fd not in running:
                continue
            task, pid, _, said = running.pop(fd)
            if fd not in ready:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(fd)
            killer = said.read_text() if said.exists() and status != SURVIVED else ""
            if status == BROKEN:
                raise RuntimeError(f"{task.module}: {task.mutant.name}: {killer}")
            if fd not in ready or status == -signal.SIGXCPU:
                status = TIMEOUT
            elif status != SURVIVED:
                status = KILLED  # by a failed test, or the interpreter died
                if killer:
                    speed = 1.0 / (0.05 + time.time() - said.stat().st_mtime)
                    for weight, place in zip((4.0, 1.0), task.places, strict=True):
                        merits[place, killer] += weight * speed
            done += 1
            if done % 20 == 0 or status == SURVIVED:
                note = f": survived: {task.mutant.name}" if status == SURVIVED else ""
                print(f"{time.strftime('%H:%M:%S')} {done}/{len(tasks)} {task.module}{note}", flush=True)
            yield Verdict(task.module, task.mutant.name, status, killer)


def _limited(task: _Task, order: list[str], said: Path) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime + task.limit) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    task.work(order, said)


def _fork(work: Callable[[], None]) -> int:
    """Fork, run `work` in the child without output, and end the child; return its id."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads; those of torch sleep
        pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(BROKEN)


def _quiet() -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)


# Of the tests of a group


def _collect(tests: Iterable[str], out: Path, plugin: object) -> None:
    """Run pytest in this process with `plugin`, and end the process with its status."""
    status = pytest.main(
        [
            *(str(ROOT / path) for path in tests),
            f"--rootdir={ROOT}",
            f"--config-file={ROOT / 'pyproject.toml'}",
            f"--basetemp={out / 'tests'}",
            "--timeout=0",  # its alarm would be one of the tests'; workers have limits
            "--capture=no",
            "--quiet",
            "--no-header",
            "--no-summary",
            "-pno:cacheprovider",
            "-Wignore::pytest.PytestAssertRewriteWarning",  # hypothesis is imported before pytest
            "-m",
            MARKS,
        ],
        plugins=[_Settings(), plugin],
    )
    sys.stdout.flush()
    os._exit(int(status))


class _Settings:
    """hypothesis without chance, memory and shrinking: the same mutants die each time, and soon."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile(
            "mutants", settings.get_profile("koopmon"), database=None, derandomize=True, phases=phases
        )
        settings.load_profile("mutants")


class _Failures:
    """Ends the process at the first failed test."""

    def __init__(self, said: Path) -> None:
        self._said = said

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        # The report of a failure formats sources, and takes longer than most tests.
        if call.excinfo is not None and not isinstance(call.excinfo.value, pytest.skip.Exception):
            os._exit(KILLED)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._said.write_text(f"collection of {report.nodeid}")
            os._exit(KILLED)


class _Session:
    """Tries mutants of functions in place of pytest's own loop over the tests."""

    def __init__(self, sources: Sequence[Source], out: Path, jobs: int) -> None:
        self._sources = sources
        self._out = out
        self._jobs = jobs

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            os._exit(BROKEN)
        session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one folder for all forks
        gc.collect()
        functions = _functions(source.module for source in self._sources)
        gc.freeze()  # fewer pages are copied in each fork
        items = {item.nodeid: item for item in session.items}
        reached = self._reach(items)
        seconds = {name: took for name, (took, _, _) in reached.items()}
        used = {name: took for name, (_, took, _) in reached.items()}
        everything = sorted(items, key=lambda name: reached[name][0])
        tasks: list[_Task] = []
        import_plan: dict[str, tuple[float, list[str], dict[str, float]]] = {}
        for source in self._sources:
            lines_of = {name: set(lines.get(source.module, ())) for name, (_, _, lines) in reached.items()}
            # A change of what runs at import can matter to every test that enters a function of the module.
            entering = [name for name in everything if lines_of[name]] or everything
            import_plan[source.module] = _limit(used[name] for name in entering) + 20.0, entering, seconds
            for mutant in source.mutants:
                if mutant.scope is None:
                    continue
                tests = [name for name in everything if not lines_of[name].isdisjoint(mutant.lines)]
                live = functions[str(ROOT / source.module), mutant.scope]
                work = _patching(items, live, source, mutant)
                limit = _limit(used[name] for name in tests)
                tasks.append(_Task(source.module, mutant, tests, seconds, limit, work))
        (self._out / "import.json").write_text(json.dumps(import_plan))
        verdicts = [vars(one) for one in _try_all(tasks, self._jobs, self._out)]
        (self._out / "verdicts.json").write_text(json.dumps(verdicts))
        return True

    def _reach(self, items: dict[str, pytest.Item]) -> dict[str, tuple[float, float, dict[str, list[int]]]]:
        """For each test its seconds on the clock and of CPU time, and the lines of each module that it reaches."""
        out = self._out / "reach.json"
        pid = _fork(lambda: self._trace(list(items.values()), out))
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != SURVIVED:
            raise RuntimeError(f"{out.read_text() if out.exists() else 'a test'} fails without a mutant")
        found: dict[str, tuple[float, float, dict[str, list[int]]]] = json.loads(out.read_text())
        return found

    def _trace(self, items: list[pytest.Item], out: Path) -> None:
        _quiet()
        by_path: dict[str, set[int]] = {str(ROOT / source.module): set() for source in self._sources}
        calls: Counter[CodeType] = Counter()

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            lines = by_path.get(frame.f_code.co_filename)
            if lines is None or calls[frame.f_code] >= TRACED_CALLS:
                return None
            calls[frame.f_code] += 1

            def local(frame: FrameType, event: str, argument: object) -> Any:
                lines.add(frame.f_lineno)
                return local

            lines.add(frame.f_lineno)
            return local

        found = {}
        items[0].config.pluginmanager.register(_Failures(out))
        threading.settrace(trace)
        for item, following in zip(items, [*items[1:], None], strict=True):
            for lines in by_path.values():
                lines.clear()
            calls.clear()
            out.write_text(item.nodeid)
            started, used = time.monotonic(), time.process_time()
            sys.settrace(trace)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            seconds = time.monotonic() - started, time.process_time() - used
            found[item.nodeid] = *seconds, {s.module: sorted(by_path[str(ROOT / s.module)]) for s in self._sources}
        out.write_text(json.dumps(found))
        os._exit(SURVIVED)


def _run(items: Sequence[pytest.Item], said: Path) -> NoReturn:
    """Run tests; end the process by SURVIVED when none fails."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        said.write_text(item.nodeid)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    os._exit(SURVIVED)


def _limit(seconds: Iterable[float]) -> float:
    """Seconds of CPU time for tests that take `seconds` without a mutant; generous, since slow is not wrong."""
    return 5.0 + 5.0 * sum(seconds)


# Putting the mutant in place


Place = tuple[str, int]
"""Qualified name and first line of a function."""


def _functions(modules: Iterable[str]) -> dict[tuple[str, Place], list[FunctionType]]:
    """The functions of the modules, by file and place, wherever they are referred to."""
    paths = {str(ROOT / module) for module in modules}
    found: dict[tuple[str, Place], list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in paths:
            found[thing.__code__.co_filename, _place(thing.__code__)].append(thing)
    return found


def _patching(
    items: dict[str, pytest.Item], live: list[FunctionType], source: Source, mutant: Mutant
) -> Callable[[list[str], Path], None]:
    """Work of a fork of the session: the function gets the code of the mutant."""

    def work(order: list[str], said: Path) -> None:
        _quiet()
        try:
            (new,) = [code for code in _codes(source.compiled(mutant)) if _place(code) == mutant.scope]
            if not live:
                raise RuntimeError(f"no function at {mutant.scope}")
            for function in live:
                # Without its `super()` a method has no cell for its class.
                function.__code__ = new if new.co_freevars else new.replace(co_freevars=function.__code__.co_freevars)
        except Exception as error:
            said.write_text(repr(error))
            raise
        items[order[0]].config.pluginmanager.register(_Failures(said))
        _run([items[name] for name in order], said)

    return work


def _place(code: CodeType) -> Place:
    return code.co_qualname, code.co_firstlineno


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _importing(source: Source, mutant: Mutant, out: Path) -> Callable[[list[str], Path], None]:
    """Work of a fork of the parent: it imports the changed module instead of the one on disk."""

    def work(order: list[str], said: Path) -> None:
        _quiet()
        sys.meta_path.insert(0, _Finder(source.module, source.compiled(mutant)))
        files = dict.fromkeys(name.partition("::")[0] for name in order)
        _collect(files, out / said.name.replace("killer", "import"), _InOrder(order, said))

    return work


class _Finder:
    """Finds the one module that is changed."""

    def __init__(self, module: str, code: CodeType) -> None:
        self._path = str(ROOT / module)
        self._name = ".".join(Path(module).with_suffix("").parts).removesuffix(".__init__")
        self._code = code

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> Any:
        if name != self._name:
            return None
        code = self._code

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:
                return code

        folder = [str(Path(self._path).parent)] if self._path.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            name, self._path, loader=Loader(name, self._path), submodule_search_locations=folder
        )


class _InOrder(_Failures):
    """Runs the tests in the order given; the process ends by SURVIVED when none fails."""

    def __init__(self, order: list[str], said: Path) -> None:
        super().__init__(said)
        self._order = order

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        rank = {name: number for number, name in enumerate(self._order)}
        _run(sorted(session.items, key=lambda item: rank.get(item.nodeid, len(rank))), self._said)
