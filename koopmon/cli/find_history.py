"""Finds the history of a run: in the run's own file, or in the file of a shared monitor."""

from __future__ import annotations

import contextlib
import difflib
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from koopmon.cli.launch_inspection import monitor_store, run_store
from koopmon.errors import StoreError

if TYPE_CHECKING:
    from koopmon.history.reader import HistoryReader
    from koopmon.history.rows import RunOverview

MAX_STORES = 50
"""Maximum number of history files, the newest first, to search for a name or for the latest run."""
MAX_NAMES = 5
NO_HISTORY = "no history of any run is known; `koopmon run -- CMD...` records one, and --store names another file"


@contextmanager
def opened(run: str | None, store: Path | None) -> Iterator[tuple[HistoryReader, Path, str]]:
    """Open the history that contains `run`, or the latest run if it is None; yield it, its path and the run's name.

    Without `store` it tries the run's own history, then the monitor's, then those of running jobs. Raises StoreError,
    which lists the known runs if none has this name.
    """
    from koopmon.history.reader import HistoryReader

    if run is None:
        run, place = latest([store] if store is not None else None)
        places = [place]
    else:
        places = [store] if store is not None else _usual(run)
    for path in places:
        with HistoryReader.open(path) as history:
            if history.run(run) is not None:
                with _no_collections():
                    yield history, path, run
                return
    raise StoreError(_advice(run, stores()[:MAX_STORES] if store is None else [store]))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Suspend the garbage collector: no row is in a cycle, and each collection walks over all rows of a long run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def stores() -> list[Path]:
    """Return the history files under the state directory and those of running jobs, the last written first."""
    from koopmon.cli.live_monitors import live_monitors

    found: set[Path] = {Path(monitor.store) for monitor in live_monitors()}
    with contextlib.suppress(OSError):
        found.update(run_store("any").parent.glob("*.sqlite3"))
    found.add(monitor_store())
    times: dict[Path, float] = {}
    for path in found:
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
            times[path] = max(times[path], _log_of(path).stat().st_mtime)
    return sorted(times, key=lambda path: times[path], reverse=True)


def overviews(
    places: Iterable[Path], unreadable: Callable[[StoreError], object] = lambda error: None
) -> list[tuple[RunOverview, Path]]:
    """Return the runs of several histories, the latest activity first. `unreadable` gets the error of each bad file."""
    from koopmon.history.reader import HistoryReader

    found: list[tuple[RunOverview, Path]] = []
    for path in places:
        try:
            with HistoryReader.open(path) as history:
                found += [(each, path) for each in history.overview()]
        except StoreError as error:
            unreadable(error)
    return sorted(found, key=lambda pair: pair[0].last_seen, reverse=True)


def latest(places: Iterable[Path] | None = None) -> tuple[str, Path]:
    """Return the run with the latest activity, and its history. Raises StoreError if there is no run."""
    from koopmon.history.reader import HistoryReader

    found: list[tuple[float, str, Path]] = []
    for path in stores()[:MAX_STORES] if places is None else places:
        try:
            with HistoryReader.open(path) as history:
                found += [(row.last_seen, row.name, path) for row in history.recent_runs(1)]
        except StoreError:
            if places is not None:
                raise
    if not found:
        raise StoreError(NO_HISTORY if places is None else f"store {next(iter(places))}: it has no run")
    _, name, path = max(found)
    return name, path


def complete_run(incomplete: str) -> list[str]:
    """Return the known names of runs that begin with `incomplete`, the latest first, for a shell's completion."""
    from koopmon.history.reader import HistoryReader

    names: list[str] = []
    for path in stores()[:MAX_STORES]:
        with contextlib.suppress(StoreError), HistoryReader.open(path) as history:
            names += [name for name in reversed(history.runs()) if name.startswith(incomplete) and name not in names]
    return names


def _usual(run: str) -> list[Path]:
    """Return the histories that may have a run of this name."""
    from koopmon.cli.live_monitors import live_monitors

    # A further stack or model of a job is a run NAME.PART in the history of the job.
    parts = run.split(".")
    jobs = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    live = [Path(monitor.store) for job in jobs for monitor in live_monitors() if monitor.run == job]
    own = [run_store(job) for job in jobs if job]
    return [path for path in dict.fromkeys((*live, *own, monitor_store())) if path.is_file()]


def _log_of(path: Path) -> Path:
    """Return SQLite's write-ahead log, which has the time of the last write."""
    return path.with_name(f"{path.name}-wal")


def _advice(run: str, places: list[Path]) -> str:
    from koopmon.history.reader import HistoryReader

    names: list[str] = []
    for path in places:
        with contextlib.suppress(StoreError), HistoryReader.open(path) as history:
            names += [name for name in reversed(history.runs()) if name not in names]
    where = str(places[0]) if len(places) == 1 else f"{len(places)} histories under the state directory"
    if not names:
        return f"run {run!r}: {NO_HISTORY}"
    near = difflib.get_close_matches(run, names, n=MAX_NAMES, cutoff=0.5)
    meant = f"did you mean {', '.join(near)}?" if near else f"the last ones are {', '.join(names[:MAX_NAMES])}"
    return f"run {run!r}: not in {where}; {meant}"
