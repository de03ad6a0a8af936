"""One rank of small trainings in several layouts, without a logged loss. It writes its own losses and gradient norms.

Usage: measured.py OUT ENDPOINT LAYOUT...; writes OUT.RANK.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import koopmon
from tests.agent.models import batch, build, loss_of

STEPS, PARTS = 12, 2


def wrapped(layout: str) -> nn.Module:
    model = build()
    if layout.startswith("fsdp2"):
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        return model
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return DistributedDataParallel(model)


def train(layout: str, endpoint: str, rank: int) -> dict[str, list[float]]:
    model: Any = wrapped(layout)
    zero = layout == "zero"
    optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        if zero
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    agent = koopmon.attach(model, optimizer, endpoint=endpoint, run=layout, config={"cadence": {"dense_every": 1}})
    deadline = time.monotonic() + 60.0
    while not agent.status()["connected"]:
        assert time.monotonic() < deadline, agent.status()
        time.sleep(0.01)
    own: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in range(PARTS):
            last = part == PARTS - 1
            if layout == "fsdp2-late":
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or layout != "ddp-late" else model.no_sync():
                loss = loss_of(model, batch(PARTS * step + part, rank)) / PARTS
                loss.backward()
            total += float(loss.detach())
        squares = [float(each.grad.double().pow(2).sum()) for each in model.parameters() if each.grad is not None]
        optimizer.step()
        own["losses"].append(total)
        own["norms"].append(math.sqrt(sum(squares)))
        time.sleep(0.02)
    assert agent.status()["errors"] == 0, agent.status()
    agent.close()
    return own


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    results = {}
    for layout in sys.argv[3:]:
        dist.barrier()
        results[layout] = train(layout, sys.argv[2], rank)
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    dist.barrier()
    os._exit(0)  # the interpreter's own end of gloo may take seconds
