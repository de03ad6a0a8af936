"""Proof of koopmon's behaviour in each training layout: `python -m benchmarks.matrix`.

Real ranks over gloo train a tiny model in every cell of `benchmarks.matrix.cells`, three times: without koopmon, with
koopmon and no command, and under commands (`benchmarks.matrix.proof`). One torchrun serves all cells of one world size.
It takes about 20 minutes on 2 idle cores. The exit status is 1 if a cell is wrong. The printed folder keeps finished
cells, and `--work FOLDER` continues from it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import campaign
from benchmarks.matrix.cells import SLICE, WHY, Cell, cells
from benchmarks.provenance import provenance

RESULT = Path(__file__).parents[1] / "results" / "matrix.json"
ROOT = Path(__file__).resolve().parents[2]
STATES = ("proven", "untested", "refused", "not in torch", "wrong")
CELL_SECONDS = 900.0
"""Time after which a cell counts as hung."""


def try_cells(chosen: Sequence[Cell], folder: Path, console: Console) -> list[dict[str, Any]]:
    """Return the results of each cell, in the order of `chosen`. Results in `folder` are reused."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "cells.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("cells", total=len(chosen))
        for size, group in groupby(chosen, key=lambda cell: cell.world_size):
            mine = list(group)
            while missing := [cell for cell in mine if cell.name not in _told(out)]:
                for num_told in _run_ranks(size, missing, out, folder):
                    progress.update(task, completed=num_told)
                told = _told(out)
                if any(cell.name in told for cell in missing):
                    continue  # start new ranks if the last cell ended the old ones
                victim = next(cell for cell in missing if cell.name not in told)
                ended = {"state": "wrong", "line": f"its ranks ended; see {folder}/{size}.log", "checks": {}}
                with out.open("a") as log:
                    log.write(json.dumps({"name": victim.name, **asdict(victim), **ended}) + "\n")
            progress.update(task, completed=len(_told(out)))
    told = _told(out)
    return [told[cell.name] for cell in chosen]


def _run_ranks(size: int, chosen: Sequence[Cell], out: Path, folder: Path) -> Iterator[int]:
    """Run one torchrun to its end, or until a cell takes too long; yield the number of finished cells from time to
    time.
    """
    listed = folder / f"{size}.json"
    listed.write_text(json.dumps([asdict(cell) for cell in chosen]))
    with tempfile.TemporaryDirectory(prefix="koopmon-") as sockets, (folder / f"{size}.log").open("ab") as log:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m"]
        ranks = subprocess.Popen(
            [sys.executable, *words, "benchmarks.matrix.ranks", str(listed), str(out), sockets],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            seen, since = -1, time.monotonic()
            while ranks.poll() is None:
                time.sleep(0.2)
                if (now := len(_told(out))) != seen:
                    seen, since = now, time.monotonic()
                    yield now
                elif time.monotonic() - since > CELL_SECONDS:
                    break
        finally:
            ranks.send_signal(signal.SIGTERM)  # torchrun ends its ranks
            ranks.wait()


def _told(out: Path) -> dict[str, dict[str, Any]]:
    """Read results by name of the cell. A truncated line does not count."""
    found = {}
    for line in out.read_text().splitlines() if out.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["name"]] = row
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--cells", choices=("all", "slice"), default="all", help="slice: the cells of the tests")
    parser.add_argument("--only", help="cells whose name contains this text")
    parser.add_argument("--finished", action="store_true", help="run nothing; write the finished cells of --work")
    parser.add_argument("--work", type=Path, help="folder of finished cells to continue from; default: a new one")
    parser.add_argument("--out", type=Path, help="file for the JSON (default for all cells: results/matrix.json)")
    options = parser.parse_args(arguments)
    console = campaign.console()
    chosen = [cell for cell in cells() if options.cells == "all" or cell.name in SLICE]
    chosen = [cell for cell in chosen if not options.only or options.only in cell.name]
    if options.finished:
        told = _told(options.work / "cells.jsonl") if options.work else {}
        chosen = [cell for cell in chosen if cell.name in told]
    if not chosen:
        parser.error("no cell is left: see --only, --work and --finished")
    folder = options.work or Path(tempfile.mkdtemp(prefix="koopmon-matrix-"))
    console.print(f"[dim]{len(chosen)} cells, kept in {folder}[/dim]")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise the ranks would outlive this process
    try:
        rows = try_cells(chosen, folder, console)
    except KeyboardInterrupt:
        console.print(f"interrupted: go on with --work {folder}")
        return 130
    table = Table("cell", "state", "line", "seconds", title="support matrix")
    for row in rows:
        failed = ", ".join(name for name, held in row["checks"].items() if not held)
        table.add_row(row["name"], row["state"], failed or row["line"], str(row.get("seconds", "")))
    console.print(table)
    counts = Counter(row["state"] for row in rows)
    console.print(", ".join(f"{counts[state]} {state}" for state in STATES))
    out = options.out or (RESULT if options.finished or len(chosen) == len(cells()) else None)
    if out is not None:
        document = {
            "provenance": provenance(0),
            "device": "cpu",
            "backend": "gloo",
            "why": WHY,
            "minutes": round(sum(row.get("seconds", 0.0) for row in rows) / 60.0, 2),
            "num_cells": len(cells()),
            "counts": {state: counts[state] for state in STATES},
            "cells": rows,
        }
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
