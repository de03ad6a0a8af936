"""One rank of a training under ceilings; writes what it saw as JSON.

Usage: ceilings.py OUT ENDPOINT. Trains under DDP until `agent.should_stop`. Writes OUT.RANK: the digest of the weights,
the layers held after each step, and the norm of a writing weight of block 0.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import koopmon
from tests.agent.models import build, train_step
from tests.agent.programs.ddp import digest

MOST = 20_000


def main(out: str, endpoint: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model: Any = DistributedDataParallel(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    agent = koopmon.attach(model, optimizer, endpoint=endpoint, run="job")
    norms: list[float] = []
    held: list[list[int]] = []
    while len(norms) < MOST and not agent.should_stop:
        train_step(model, optimizer, len(norms), rank)
        norms.append(float(model.module.blocks[0].down.weight.detach().double().norm()))
        held.append(agent.status()["held_layers"])
        time.sleep(0.005)
    agent.close()
    Path(f"{out}.{rank}").write_text(json.dumps({"digest": digest(model), "norms": norms, "held": held}))
    time.sleep(0.1)  # gloo lets go of its last collective in a thread that needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
