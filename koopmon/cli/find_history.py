"""Finds the history of a run: in the run's own file, or in the file of a shared monitor."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from koopmon.cli.launch_inspection import monitor_store, run_store
from koopmon.errors import StoreError

if TYPE_CHECKING:
    from koopmon.history.reader import HistoryReader

MAX_STORES = 50
"""Maximum number of history files, the newest first, to search for similar run names."""
MAX_NAMES = 5


@contextmanager
def opened(run: str, store: Path | None) -> Iterator[tuple[HistoryReader, Path]]:
    """Open the history that contains `run`; yield it and its path.

    Without `store` it tries the run's own history, then the monitor's. Raises StoreError, which lists the known runs
    if none has this name.
    """
    from koopmon.history.reader import HistoryReader

    usual = [path for path in (run_store(run), monitor_store()) if path.is_file()]
    for path in usual if store is None else [store]:
        with HistoryReader.open(path) as history:
            if history.run(run) is not None:
                yield history, path
                return
    raise StoreError(_advice(run, _all_stores() if store is None else [store]))


def _all_stores() -> list[Path]:
    """Return every history file under the state directory, the most recently written first."""
    shared = monitor_store()
    with contextlib.suppress(OSError):
        files = [*run_store("any").parent.glob("*.sqlite3"), *([shared] if shared.is_file() else [])]
        return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)[:MAX_STORES]
    return []


def _advice(run: str, places: list[Path]) -> str:
    from koopmon.history.reader import HistoryReader

    names: list[str] = []
    for path in places:
        with contextlib.suppress(StoreError), HistoryReader.open(path) as history:
            names += [name for name in reversed(history.runs()) if name not in names]
    where = str(places[0]) if len(places) == 1 else f"{len(places)} histories under the state directory"
    if not names:
        return f"run {run!r}: no history of any run is known; name the file with --store"
    near = difflib.get_close_matches(run, names, n=MAX_NAMES, cutoff=0.5)
    meant = f"did you mean {', '.join(near)}?" if near else f"the last ones are {', '.join(names[:MAX_NAMES])}"
    return f"run {run!r}: not in {where}; {meant}"
