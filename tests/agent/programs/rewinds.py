"""One rank of trainings that are sent back to a copy, one for each layout; writes what it saw as JSON.

Usage: rewinds.py OUT ENDPOINT LAYOUT..., where LAYOUT is ddp, zero, fsdp1, fsdp1-flat, fsdp2, or `alone`: DDP, where
only rank 0 keeps copies. In ddp-groups and fsdp2-groups, a second group trains at 32 times the rate from step FAULT on,
and the rewind bounds it. Writes OUT.RANK: by layout the losses after the rewind and those of a plain twin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import koopmon
from tests.agent.models import Block, build, train_step
from tests.agent.programs.ddp import digest

MOST = 2000
AFTER = 10
"""Steps after the rewind."""
FAULT = 70
RATE = 1 / 128


def wrapped(layout: str) -> nn.Module:
    model: nn.Module = build()
    if layout.startswith("fsdp2"):
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
        return model
    if layout.startswith("fsdp1"):
        policy: Any = ModuleWrapPolicy({Block})
        device = torch.device("cpu")
        original = layout == "fsdp1"
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=device)
    return DistributedDataParallel(model)


def make_optimizer(layout: str, model: nn.Module) -> torch.optim.Optimizer:
    if layout == "zero":
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    if layout.endswith("-groups"):
        weights = list(model.parameters())
        return torch.optim.AdamW([{"params": weights[:-2]}, {"params": weights[-2:]}], lr=RATE)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(layout: str, endpoint: str, rank: int) -> dict[str, Any]:
    model = wrapped(layout)
    optimizer = make_optimizer(layout, model)
    limits = {"max_rewinds": 0 if layout == "alone" and rank == 1 else 8}
    agent = koopmon.attach(model, optimizer, endpoint=endpoint, run=layout, config={"limits": limits})
    losses: list[float] = []
    rewound = copied = -1
    while len(losses) < MOST and (rewound < 0 or len(losses) < rewound + AFTER):
        fault = layout.endswith("-groups") and len(losses) >= FAULT
        if fault:
            optimizer.param_groups[1]["lr"] = 32 * RATE
        time.sleep(0.03 if fault and rewound < 0 else 0.005)
        losses.append(train_step(model, optimizer, len(losses), rank))
        status = agent.status()
        if rewound < 0 and status["rewinds"]:
            rewound, copied = len(losses), max(status["rewind_steps"])
        if agent.should_stop:
            break
    status = agent.status()
    agent.close()
    twin = wrapped(layout)
    optimizer = make_optimizer(layout, twin)
    # Without a rewind the twin repeats the whole training.
    steps = range(len(losses)) if rewound < 0 else [*range(copied), *range(rewound, len(losses))]
    expected = [train_step(twin, optimizer, step, rank) for step in steps]
    whole = digest(model) == digest(twin) if not layout.startswith("fsdp1") else None
    return {
        "rewound": rewound,
        "copied": copied,
        "losses": losses[max(rewound, 0) :],
        "expected": expected[max(copied, 0) :],
        "same": whole,
        "status": status,
    }


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    out, endpoint, *layouts = sys.argv[1:]
    results = {}
    for layout in layouts:
        dist.barrier()
        results[layout] = train(layout, endpoint, rank)
        Path(f"{out}.{rank}").write_text(json.dumps(results))
    time.sleep(0.1)  # gloo lets go of its last collective in a thread that needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
