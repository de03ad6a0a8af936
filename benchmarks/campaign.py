"""Campaigns of many trainings over all cores: resumable, with a progress bar, with each result in a file.

A case is a frozen dataclass, and its file has its fields. A file with other fields, or a truncated one, is computed
again. An interrupted campaign keeps its finished cases and continues with the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DAMAGE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, RecursionError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Exceptions of numpy for a truncated or damaged archive."""
Arrays = Mapping[str, "np.ndarray[Any, Any]"]


KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Environment of training processes.

By default, glibc returns large blocks to the kernel when they are freed. Each step of a state space then spent 40% of
its time on new pages.
"""


class Case(Protocol):
    """A frozen dataclass of plain values; `name` is short and starts the name of its file."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Case)


@dataclass(frozen=True, slots=True)
class Kept(Generic[C]):
    """One finished case: its scalars (JSON) and its series (arrays with one row per step)."""

    case: C
    scalars: Mapping[str, Any]
    series: Arrays


Work = Callable[[C], tuple[Mapping[str, Any], Arrays]]


def console() -> Console:
    """Console as wide as the terminal; for a file, wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 160)


def options(parser: argparse.ArgumentParser, result: Path) -> None:
    """Add the options that all campaigns share."""
    parser.add_argument("--scale", choices=("default", "paper"), default="default", help="paper: for GPUs, for days")
    parser.add_argument("--work", type=Path, help="folder of finished runs, to go on with; default: a fresh one")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--out", type=Path, default=result, help="where the JSON goes (default %(default)s)")


def run(cases: Sequence[C], work: Work[C], folder: Path | None, *, workers: int, console: Console) -> list[Kept[C]]:
    """Compute the result of every case, in the order of `cases`.

    Raises ValueError if `workers` is below 1, and RuntimeError with the case if one fails. The other results are kept.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: must be at least 1")
    folder = folder or Path(tempfile.mkdtemp(prefix="koopmon-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"[dim]{len(cases)} runs, kept in {folder}[/dim]")
    found: dict[int, Kept[C]] = {}
    for index, case in enumerate(cases):
        kept = _read(case, folder, console)
        if kept is not None:
            found[index] = kept
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed: list[str] = []
    for name, value in KEPT_MEMORY.items():
        os.environ.setdefault(name, value)
    # spawn: a forked child inherits the state of the parent's thread pools.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    with Progress(*columns, console=console) as progress, pool, terminated_as_interrupted():
        task = progress.add_task("training", total=len(cases), completed=len(found))
        waiting: dict[Future[Kept[C]], int] = {
            pool.submit(_do, work, case, folder): index for index, case in enumerate(cases) if index not in found
        }
        try:
            for future in as_completed(waiting):
                index = waiting[future]
                try:
                    found[index] = future.result()
                except Exception as error:
                    failed.append(f"{cases[index].name}: {type(error).__name__}: {error}")
                progress.update(task, advance=1, description=cases[index].name)
        except KeyboardInterrupt:
            console.print("interrupted: the runs that have begun end first")
            # Wait as well: the exit of the pool would undo the cancellation before its thread has processed it.
            pool.shutdown(wait=True, cancel_futures=True)
            num_kept = sum(_path(case, folder).exists() for case in cases)
            console.print(f"{num_kept} of {len(cases)} runs are kept; go on with --work {folder}")
            raise SystemExit(130) from None
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cases)} runs failed; the first: {failed[0]}")
    return [found[index] for index in range(len(cases))]


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the campaign like Ctrl-C. Without it the workers would continue."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _do(work: Work[C], case: C, folder: Path) -> Kept[C]:
    scalars, series = work(case)
    path = _path(case, folder)
    described = json.dumps({"case": _fields(case), "scalars": dict(scalars)})
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, about=np.array(described), **dict(series))  # type: ignore[arg-type]
    partial.replace(path)
    return Kept(case, dict(scalars), dict(series))


def _read(case: C, folder: Path, console: Console) -> Kept[C] | None:
    path = _path(case, folder)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            about = json.loads(str(archive["about"]))
            series = {name: archive[name] for name in archive.files if name != "about"}
        case_fields, scalars = about["case"], dict(about["scalars"])
    except DAMAGE as error:
        console.print(f"[yellow]{path.name} is damaged ({type(error).__name__}); this run is made again[/yellow]")
        return None
    return Kept(case, scalars, series) if case_fields == _fields(case) else None


def _fields(case: Case) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(asdict(case)))  # type: ignore[call-overload]
    return fields


def _path(case: Case, folder: Path) -> Path:
    digest = hashlib.sha256(json.dumps(_fields(case), sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{case.name}-{digest}.npz"
