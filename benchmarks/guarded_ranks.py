"""Training ranks of `benchmarks.guarded` under torchrun: many small trainings in turn, each attached to one monitor.

It is not for manual use.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import koopmon
from benchmarks.control import Controller
from benchmarks.training import LAST, MAX_GRADIENT_NORM, MAX_LOSS, Recipe, accuracy, warmed

ATTACH_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training with the run name `run`; it is unguarded if the endpoint is ""."""

    run: str
    recipe: Recipe
    endpoint: str = ""


def train_one(job: Job) -> dict[str, Any]:
    """Train `job` on all ranks; return the results of rank 0."""
    recipe, rank, size = job.recipe, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(recipe.seed)
    plain = recipe.model()
    model = DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmed(recipe, step))
    agent = None
    if job.endpoint:
        agent = koopmon.attach(model, optimizer, endpoint=job.endpoint, run=job.run)
        _wait_for_monitor(agent)
    spike = Controller("spike") if recipe.control == "spike" else None
    began, losses, died_at = time.monotonic(), [], None
    for step in range(recipe.steps):
        tokens, labels = (part[rank::size] for part in recipe.batch_at(step))
        loss = recipe.loss(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        told = torch.stack([loss.detach(), norm])
        dist.all_reduce(told)
        value, length = (told / size).tolist()
        losses.append(value)
        if not (value <= MAX_LOSS and length <= MAX_GRADIENT_NORM):
            died_at = step
            break
        if recipe.clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip, norm)
        if spike is not None:
            spike.see(step, None, value, recipe.lr)
            for group in optimizer.param_groups:
                group["lr"] = schedule.get_last_lr()[0] * spike.lr_scale
        optimizer.step()
        schedule.step()
    if agent is not None:
        agent.close()
    return {
        "run": job.run,
        "died_at": died_at,
        "final_loss": None if died_at is not None else statistics.fmean(losses[-LAST:]),
        "accuracy": None if died_at is not None else accuracy(plain, recipe),
        "seconds": time.monotonic() - began,
        "digests": _digests(plain),
    }


def _wait_for_monitor(agent: koopmon.Agent) -> None:
    """Attach like `koopmon run`. The first steps of such a short training matter."""
    deadline = time.monotonic() + ATTACH_SECONDS
    while not agent.status()["connected"] and time.monotonic() < deadline:
        time.sleep(0.01)
    dist.barrier()


def _digests(model: nn.Module) -> list[str]:
    """Return a checksum of the parameters of every rank; equal ones mean equal replicas."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [bytes(one.tolist()).hex()[:16] for one in every]


def main() -> None:
    """Train the jobs of the first file that the second file lacks, and append the results to the second file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    jobs = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[Job])
    out = Path(sys.argv[2])
    finished = {json.loads(line)["run"] for line in out.read_text().splitlines()} if out.exists() else set()
    dist.barrier()  # every rank reads the file before rank 0 appends to it
    with out.open("a") if dist.get_rank() == 0 else Path(os.devnull).open("w") as log:
        for job in jobs:
            if job.run not in finished:
                log.write(json.dumps(train_one(job)) + "\n")
                log.flush()
    # gloo releases its last collective in a thread that needs the interpreter: an immediate exit would abort it.
    time.sleep(0.1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
