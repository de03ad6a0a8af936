"""Ranks of `benchmarks.matrix` under torchrun: they test one cell after the other, and rank 0 writes the results.

Usage: matrix.ranks CELLS OUT DIRECTORY. CELLS is a JSON file of `Cell` fields. The program appends a line of JSON to
OUT for each cell without one. DIRECTORY is for the sockets of a monitor that rank 0 runs. It is not for manual use.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.matrix.cells import Cell
from benchmarks.matrix.proof import prove
from tests.agent.scripted_monitor import ScriptedMonitor


def main() -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    cells = [Cell(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    out, directory = Path(sys.argv[2]), Path(sys.argv[3])
    finished = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    if size > 1:
        dist.barrier()  # every rank reads the file before rank 0 appends to it
    for index, cell in enumerate(cells):
        if cell.name in finished:
            continue
        started = time.monotonic()
        place = directory / f"{size}-{index}"
        if rank == 0:
            with ScriptedMonitor(place) as monitor:
                found = prove(cell, rank, f"ipc://{place}/control", monitor)
            told = {"name": cell.name, **asdict(cell), **found, "seconds": round(time.monotonic() - started, 2)}
            with out.open("a") as log:
                log.write(json.dumps(told) + "\n")
        else:
            prove(cell, rank, f"ipc://{place}/control", None)
        if size > 1:
            dist.barrier()  # fails if this cell broke the connections: new ranks continue with the next cell
    if size > 1:
        dist.barrier()
        time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
        dist.destroy_process_group()


if __name__ == "__main__" and len(sys.argv) > 1:
    main()
