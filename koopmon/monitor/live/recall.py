"""After a restart the live page begins with what the history knows: read in a thread of its own, a little at a time.

The daemon's loop reads nothing of it and waits for none of it. First every run's points, decisions and last spectrum,
then the heatmaps, whose rows are the large ones.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from koopmon.errors import StoreError, one_line
from koopmon.monitor.history import DecisionRow, History, ObservationRow, ProfileRow, RunRow
from koopmon.monitor.live.board import MAX_DECISIONS, MAX_POINTS, LiveBoard
from koopmon.monitor.live.records import Column, Decided, Order, Point, RunView, recorded_column, recorded_spectrum
from koopmon.monitor.runs import RunState

logger = logging.getLogger(__name__)

MAX_RECALLED = 64
"""Runs, those seen last."""
MAX_COLUMNS = 120
"""Of each heatmap; a row of the history takes a millisecond or two."""
PAUSE_SECONDS = 0.002
"""Between two such rows, in which the monitor has the interpreter to itself."""


class Recall:
    """Fills a board once from the store at `path`; its thread ends when it is done."""

    def __init__(self, board: LiveBoard, path: str | os.PathLike[str]) -> None:
        self._board = board
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="koopmon-recall", daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float) -> bool:
        """Whether it is done by then."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with History.open(self._path) as history:
                self._fill(history)
        except StoreError as error:
            logger.warning("live page: what was recorded earlier is not shown: %s", error)

    def _fill(self, history: History) -> None:
        known = []
        for row in reversed(history.recent_runs(MAX_RECALLED)):
            if self._stop.is_set():
                return
            with _isolated(row.name):
                points = [_point(each) for each in history.observations(row.name, last=MAX_POINTS)]
                decisions = [_decided(each) for each in history.decisions(row.name, last=MAX_DECISIONS)]
                view = _with_last(_recalled(history, row), points, next(history.profiles(row.name, last=1), None))
                self._board.restore(view, points=points, decisions=decisions)
                known.append(view)
        for view in reversed(known):
            with _isolated(view.name):
                self._fill_heatmap(history, view)

    def _fill_heatmap(self, history: History, view: RunView) -> None:
        columns, finite = [], None
        for profile in self._slowly(history, view.name):
            if (column := _column(profile)) is not None:
                columns.append(column)
                finite = profile
        if view.spectrum is None:  # the last states were not finite
            view = _with_last(view, [], finite)
        self._board.restore(view, columns=columns)

    def _slowly(self, history: History, run: str) -> Iterator[ProfileRow]:
        for row in history.profiles(run, last=MAX_COLUMNS):
            if self._stop.wait(PAUSE_SECONDS):
                return
            yield row


@contextmanager
def _isolated(run: str) -> Iterator[None]:
    """An error while one run is read does not keep the other runs from being shown."""
    try:
        yield
    except Exception as error:
        logger.warning("live page: what was recorded earlier of run %s is not shown: %s", run, one_line(error))


def _recalled(history: History, row: RunRow) -> RunView:
    """What the last launch of a run said of itself. One that the history says goes on has not been heard since."""
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


def _with_last(view: RunView, points: list[Point], last: ProfileRow | None) -> RunView:
    if points:
        view = replace(view, step=max(view.step, points[-1].step))
    try:
        found = None if last is None or last.profile is None else recorded_spectrum(last.step, last.profile)
    except (KeyError, TypeError, ValueError):
        return view
    return view if found is None else replace(view, spectrum=found)


def _column(row: ProfileRow) -> Column | None:
    try:
        return None if row.profile is None else recorded_column(row.step, row.profile)
    except (KeyError, TypeError, ValueError):
        return None


def _point(row: ObservationRow) -> Point:
    return Point(
        step=row.step,
        time=row.time,
        risk=row.risk,
        forecast=None,
        loss=row.loss,
        learning_rate=row.learning_rate,
        lr_scale=row.lr_scale,
        kss_alpha=row.kss_alpha,
    )


def _decided(row: DecisionRow) -> Decided:
    orders = tuple(
        Order(command=each.command, outcome=each.outcome, step=each.acked_step, detail=each.detail or "")
        for each in row.commands
    )
    return Decided(step=row.step, time=row.time, phase=row.phase, reason=row.reason, risk=row.risk, orders=orders)
