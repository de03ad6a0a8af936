"""Fill the live page from the history after a restart, in small steps in a separate thread.

The daemon's loop never waits for this thread. It first reads every run's points, decisions and last spectrum. It then
reads the heatmaps, which have the largest rows.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HistoryReader, ProfileRow, RunRow
from koopmon.history.schema import RunState
from koopmon.monitor.http.live_state import MAX_DECISIONS, MAX_POINTS, LiveState
from koopmon.views.run_view import DecisionView, RunView, TimelinePoint
from koopmon.views.spectra import Column, Spectrum

logger = logging.getLogger(__name__)

MAX_BACKFILLED = 64
"""Maximum number of runs, most recently seen first."""
MAX_COLUMNS = 120
"""Maximum number of columns of each heatmap; one row of the history takes a millisecond or two."""
PAUSE_SECONDS = 0.002
"""Pause after each heatmap row, which releases the GIL to the monitor."""


class LiveBackfill:
    """Fills a live state once from the store at `path`; its thread then ends."""

    def __init__(self, live_state: LiveState, path: str | os.PathLike[str]) -> None:
        self._live_state = live_state
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="koopmon-recall", daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the thread; True if it has finished."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with HistoryReader.open(self._path) as history:
                self._fill(history)
        except StoreError as error:
            logger.warning("live page: what was recorded earlier is not shown: %s", error)

    def _fill(self, history: HistoryReader) -> None:
        known = []
        for row in reversed(history.recent_runs(MAX_BACKFILLED)):
            if self._stop.is_set():
                return
            with _isolated(row.name):
                points = [TimelinePoint.of_row(each) for each in history.observations(row.name, last=MAX_POINTS)]
                decisions = [DecisionView.of_row(each) for each in history.decisions(row.name, last=MAX_DECISIONS)]
                view = _with_last(_recorded_view(history, row), points, next(history.profiles(row.name, last=1), None))
                self._live_state.backfill(view, points=points, decisions=decisions)
                known.append(view)
        for view in reversed(known):
            with _isolated(view.name):
                self._fill_heatmap(history, view)

    def _fill_heatmap(self, history: HistoryReader, view: RunView) -> None:
        columns, finite = [], None
        for profile in self._slowly(history, view.name):
            if (column := _column(profile)) is not None:
                columns.append(column)
                finite = profile
        if view.spectrum is None:  # the last states were not finite
            view = _with_last(view, [], finite)
        self._live_state.backfill(view, columns=columns)

    def _slowly(self, history: HistoryReader, run: str) -> Iterator[ProfileRow]:
        for row in history.profiles(run, last=MAX_COLUMNS):
            if self._stop.wait(PAUSE_SECONDS):
                return
            yield row


@contextmanager
def _isolated(run: str) -> Iterator[None]:
    """Log an error in the history of one run and continue with the other runs."""
    try:
        yield
    except Exception as error:
        logger.warning("live page: what was recorded earlier of run %s is not shown: %s", run, one_line(error))


def _recorded_view(history: HistoryReader, row: RunRow) -> RunView:
    """Return the last recorded launch of a run. A run without a recorded end has the state "recorded"."""
    launch = history.incarnations(row.name)[-1]
    states = {int(RunState.ENDED): "ended", int(RunState.VANISHED): "vanished"}
    state = states.get(row.state, "recorded")
    view = RunView(name=row.name, incarnation=launch.incarnation, last_heard=row.last_seen, state=state)
    if (applied := launch.applied) is not None:
        view = replace(view, lr_scale=applied.lr_scale, kss_alpha=applied.kss.alpha)
    if (hello := launch.hello) is not None:
        view = replace(view, adapter=hello.adapter, acts=hello.acts, hostname=hello.hostname)
        view = replace(view, width=hello.width, num_layers=hello.num_layers, step=hello.step)
    return view


def _with_last(view: RunView, points: list[TimelinePoint], last: ProfileRow | None) -> RunView:
    if points:
        view = replace(view, step=max(view.step, points[-1].step))
    try:
        found = None if last is None or last.profile is None else Spectrum.of(last.step, last.profile)
    except (KeyError, TypeError, ValueError):
        return view
    return view if found is None else replace(view, spectrum=found)


def _column(row: ProfileRow) -> Column | None:
    try:
        return None if row.profile is None else Column.of(row.step, row.profile["layers"])
    except (KeyError, TypeError, ValueError):
        return None
