"""The ranks of `benchmarks.matrix`, under torchrun: tries one cell after the other; rank 0 writes down what it saw.

Usage: matrix.ranks CELLS OUT DIRECTORY, where CELLS is a file of `Cell` fields in JSON; appends a line of JSON to
OUT for each cell that OUT does not tell of. DIRECTORY is for the sockets of a monitor that rank 0 runs. Not for use by
hand.
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
        dist.barrier()  # every rank has read it before rank 0 goes on writing
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
            dist.barrier()  # fails where this cell broke the connections: new ranks go on with the next
    if size > 1:
        dist.barrier()
        time.sleep(0.1)  # gloo lets go of its last collective in a thread that needs the interpreter
        dist.destroy_process_group()


if __name__ == "__main__" and len(sys.argv) > 1:
    main()
