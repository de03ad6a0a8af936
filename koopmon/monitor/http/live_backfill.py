"""Fill the live page from the history after a restart, in small steps in a separate thread.

The daemon's loop never waits for this thread. It first reads every run's points and decisions. It then reads the
profiles for heatmap and spectrum, which have the largest rows.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from koopmon.errors import StoreError, one_line
from koopmon.history.reader import HistoryReader
from koopmon.history.rows import RunRow
from koopmon.history.schema import RunState
from koopmon.monitor.http.live_state import MAX_DECISIONS, MAX_POINTS, LiveState
from koopmon.views.run_view import DecisionView, LoggedPoint, RunView, TimelinePoint
from koopmon.views.spectra import Column, Spectrum

logger = logging.getLogger(__name__)

MAX_BACKFILLED = 64
"""Maximum number of runs, most recently seen first."""
MAX_COLUMNS = 120
"""Maximum number of columns of each heatmap; one row of the history takes a millisecond or two."""
CLOSE_SECONDS = 5.0
"""Longest wait for the thread at the end: the disk may not answer."""
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

    def close(self) -> None:
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)

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
                points = [TimelinePoint.of_row(each) for each in history.assessments(row.name, last=MAX_POINTS)]
                logged = LoggedPoint.of_rows(history.heartbeats(row.name, last=MAX_POINTS))
                decisions = [DecisionView.of_row(each) for each in history.decisions(row.name, last=MAX_DECISIONS)]
                view = _recorded_view(history, row)
                view = replace(view, step=max([view.step, *(point.step for point in points[-1:])]))
                self._live_state.backfill(view, points=points, logged=logged, decisions=decisions)
                known.append(view)
        for view in reversed(known):
            with _isolated(view.name):
                self._fill_profiles(history, view)

    def _fill_profiles(self, history: HistoryReader, view: RunView) -> None:
        """Fill the heatmap of a run, and the spectrum of its last finite states."""
        columns, spectrum = [], None
        for row in history.profiles(view.name, last=MAX_COLUMNS):
            if self._stop.wait(PAUSE_SECONDS):
                return
            if row.profile is not None:
                columns.append(Column.of(row.step, row.profile))
                spectrum = Spectrum.of(row.step, row.profile)
        self._live_state.backfill(replace(view, spectrum=spectrum), columns=columns)


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
