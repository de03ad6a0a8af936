"""A user's script that is killed at any step: it goes on from its last checkpoint, and logs the rate of each update.

It has one process, or several under torchrun. The optimizer is a probe: it records the rate of its group inside
`step`, which is the rate that moves the weights. A file named `stop` in the directory ends the script.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

WARMUP, STEPS, EVERY = 400, 100_000, 5
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def log(**fields):
    os.write(LOG, (json.dumps({"pid": os.getpid(), **fields}) + "\n").encode())


class Probe(torch.optim.AdamW):
    def step(self, closure=None):
        if LOGGED is not None and self.param_groups[0]["params"][0] is LOGGED["of"]:
            log(step=LOGGED["step"], scheduled=LOGGED["scheduled"], used=float(self.param_groups[0]["lr"]))
        return super().step(closure)


def main():
    global LOGGED, LOG
    directory, norm, rate = Path(sys.argv[1]), sys.argv[2] == "norm", float(sys.argv[3])
    LOG = os.open(directory / f"rank{RANK}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    LOGGED = None
    torch.set_num_threads(1)
    if SIZE > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    trunk = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
    if not norm:
        for layer in trunk.layers:
            layer.norm1 = layer.norm2 = nn.Identity()
    model = nn.Sequential(nn.Embedding(256, 32), trunk, nn.Linear(32, 256))
    if SIZE > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = Probe(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    checkpoint = directory / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    for step in range(first, STEPS):
        if SIZE > 1:
            ends = torch.tensor(float((directory / "stop").exists()))
            dist.all_reduce(ends)
        if (directory / "stop").exists() if SIZE == 1 else ends > 0:
            break
        draw = torch.Generator().manual_seed(1000 * step + RANK)
        tokens = torch.randint(256, (4, 33), generator=draw)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        scheduled = optimizer.param_groups[0]["lr"]
        LOGGED = {"of": optimizer.param_groups[0]["params"][0], "step": step, "scheduled": scheduled}
        log(begins=step)
        optimizer.step()
        LOGGED = None
        schedule.step()
        if RANK == 0 and (step + 1) % EVERY == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**saved, "schedule": schedule.state_dict()}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
        time.sleep(0.02)
    if SIZE > 1:
        time.sleep(0.1)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
