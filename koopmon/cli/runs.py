"""`koopmon runs`: lists the recorded runs and the running jobs; `rm` and `prune` delete histories."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from koopmon.cli.console import print_json, results, say, warn
from koopmon.cli.find_history import opened, overviews, stores
from koopmon.cli.live_monitors import LiveMonitor, live_monitors
from koopmon.cli.options import AsJson, HistoryFile, option, run_names
from koopmon.errors import ConfigError, StoreError, one_line

if TYPE_CHECKING:
    from koopmon.history.rows import RunOverview

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True)
    group.callback(epilog="Example: koopmon runs --json")(runs)
    group.command("rm", epilog="Example: koopmon runs rm old-9c0d1e2f", no_args_is_help=True)(rm)
    group.command("prune", epilog="Example: koopmon runs prune --older-than 30d --yes")(prune)
    app.add_typer(group, name="runs")


def runs(context: typer.Context, store: HistoryFile = None, as_json: AsJson = False) -> int:
    """List the recorded runs, the latest first, and the address of the live page of each running job.

    The list has the histories of `koopmon run` and of the default `koopmon monitor`; --store lists another file.
    """
    if context.invoked_subcommand is not None:
        return 0
    live = {} if store is not None else {monitor.run: monitor for monitor in live_monitors()}
    found = _known(store)
    rows = [_row(each, path, live) for each, path in found]
    recorded = {row["run"] for row in rows}
    rows = [_starting(monitor) for name, monitor in live.items() if name not in recorded] + rows
    if as_json:
        print_json({"runs": rows})
    elif rows:
        _print(rows)
    else:
        say("no run is recorded; `koopmon run -- CMD...` records one, and --store names another file")
    return 0


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of the runs.", autocompletion=run_names)],
    store: HistoryFile = None,
    as_json: AsJson = False,
) -> int:
    """Delete runs with their histories. A run whose monitor is running is left as it is, with one line.

    In the history of a shared monitor, only the rows of the run are deleted.
    """
    places: list[_Due] = []
    for name in dict.fromkeys(names):
        with opened(name, store) as (_, path, _):
            places.append(_Due(path, name))
    return _remove(places, as_json)


def prune(
    older_than: Annotated[
        str, option("AGE", "Age of the last activity: a number and m, h, d or w.", "--older-than")
    ] = "30d",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question.")] = False,
    store: HistoryFile = None,
    as_json: AsJson = False,
) -> int:
    """Delete the runs without activity for a time, and histories without a run. It asks before it deletes.

    A run whose monitor is running is left as it is.
    """
    cutoff = time.time() - _seconds(older_than)
    due = [_Due(path, each.name) for each, path in _known(store) if each.last_seen < cutoff]
    due += [_Due(path, None) for path in (stores() if store is None else []) if _is_empty(path, cutoff)]
    due = [each for each in due if not _is_held(each.path)]
    if due and not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{_count(due)} would be deleted: --yes confirms it where no terminal can be asked")
        for each in due:
            warn(f"{each.run or 'no run'}: {each.path}")
        if not typer.confirm(f"Delete {_count(due)}?", err=True):
            return 1
    return _remove(due, as_json)


@dataclass(frozen=True, slots=True)
class _Due:
    """A run to delete; None for a history without a run."""

    path: Path
    run: str | None


def _remove(due: Sequence[_Due], as_json: bool) -> int:
    from koopmon.history.removal import remove_run

    removed, freed, failed = [], 0, []
    for each in due:
        try:
            freed += remove_run(each.path, each.run)
        except StoreError as error:
            failed.append(f"run {each.run!r} is left as it is: {error}")
        else:
            removed.append({"run": each.run, "store": str(each.path)})
    if as_json:
        print_json({"removed": removed, "freed_bytes": freed})
    elif removed or not failed:
        gone = [each for each in removed if each["run"] is not None]
        results().print(
            f"{len(gone)} run{'s' * (len(gone) != 1)} deleted, {freed / 2**20:.1f} MiB freed", soft_wrap=True
        )
    if failed:
        raise StoreError("; ".join(failed))
    return 0


def _count(due: Sequence[_Due]) -> str:
    named = sum(each.run is not None for each in due)
    empty = len(due) - named
    words = [f"{named} run{'s' * (named != 1)}"] if named or not empty else []
    words += [f"{empty} {'histories' if empty != 1 else 'history'} without a run"] if empty else []
    return " and ".join(words)


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([mhdw])", age.strip())
    if match is None:
        raise ConfigError(f"--older-than {age!r}: allowed are a number and m, h, d or w, such as 30d")
    return float(match[1]) * _UNITS[match[2]]


def _known(store: Path | None) -> list[tuple[RunOverview, Path]]:
    """Return the runs of `store`, else of all known histories, the latest first. A bad file gives one line."""
    if store is None:
        return overviews(stores(), lambda error: warn(str(error)))
    return overviews([store], _raise)


def _raise(error: StoreError) -> None:
    raise error


def _is_held(path: Path) -> bool:
    from koopmon.history.database import is_held

    try:
        return is_held(path)
    except OSError:
        return True


def _is_empty(path: Path, cutoff: float) -> bool:
    """Return True for a history without a run that was last written before `cutoff`."""
    from koopmon.history.reader import HistoryReader

    try:
        with HistoryReader.open(path) as history:
            return not history.runs() and path.stat().st_mtime < cutoff
    except (StoreError, OSError):
        return False


def _row(each: RunOverview, path: Path, live: dict[str, LiveMonitor]) -> dict[str, Any]:
    from koopmon.views.run_summary import state_of

    # The monitor of a job also serves its further stacks and models.
    monitor = next((each for each in live.values() if Path(each.store) == path.absolute()), None)
    page = monitor.page if monitor is not None and _is_held(path) else None
    is_running = page is not None and monitor is not None and monitor.run == each.name
    plain = asdict(each)
    return {
        "run": plain.pop("name"),
        "state": "running" if is_running else state_of(plain.pop("state"), each.last_seen, time.time()),
        "page": page,
        **{name: value for name, value in plain.items() if name != "state"},
        "store": str(path),
    }


def _starting(monitor: LiveMonitor) -> dict[str, Any]:
    """Return the row of a job of which no training process has attached yet."""
    unknown = dict.fromkeys(("last_step", "max_risk", "loss"))
    return {
        "run": monitor.run,
        "state": "starting",
        "page": monitor.page,
        "first_seen": monitor.started,
        "last_seen": monitor.started,
        "num_launches": 0,
        "num_snapshots": 0,
        **unknown,
        "lr_scale": 1.0,
        "store": monitor.store,
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    with_page = any(row["page"] for row in rows)
    right = ("steps", "highest risk", "loss", "LR scale")
    headings = ("run", "state", *right, "last activity", *(["live page"] if with_page else []))
    table = Table(*(Column(each, justify="right" if each in right else "left", overflow="fold") for each in headings))
    for row in rows:
        cells = [
            one_line(row["run"], 128),
            row["state"],
            _number(row["last_step"], ""),
            _number(row["max_risk"], ".2f"),
            _number(row["loss"], ".4g"),
            _number(row["lr_scale"], ".3g"),
            datetime.fromtimestamp(row["last_seen"]).astimezone().strftime("%Y-%m-%d %H:%M"),
        ]
        table.add_row(*cells, *([row["page"] or ""] if with_page else []))
    results().print(table, soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
