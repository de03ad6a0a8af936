"""One small training with a fixed time per step, attached to a monitor: a child of `benchmarks.alert_stack`.

It is not for manual use.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

import koopmon
from benchmarks.training import MAX_LOSS, Recipe, warmed

ATTACH_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """Training of `recipe` with the run name `run`.

    It appends one JSON line per step (step, loss, at in Unix time) to `log`. The file `stop` ends it early.
    """

    run: str
    recipe: Recipe
    endpoint: str
    log: str
    stop: str
    seconds_per_step: float = 1.0


def train(job: Paced) -> None:
    """Train until the last step, until the loss diverges, or until the file `stop` exists."""
    torch.set_num_threads(1)
    recipe = job.recipe
    torch.manual_seed(recipe.seed)
    model = recipe.model()
    optimizer = recipe.make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmed(recipe, step))
    with koopmon.attach(model, optimizer, endpoint=job.endpoint, run=job.run) as agent, Path(job.log).open("w") as log:
        deadline = time.monotonic() + ATTACH_SECONDS
        while not agent.status()["connected"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"run {job.run}: no monitor at {job.endpoint}")
            time.sleep(0.05)
        began = time.monotonic()
        for step in range(recipe.steps):
            time.sleep(max(0.0, began + step * job.seconds_per_step - time.monotonic()))
            tokens, labels = recipe.batch_at(step)
            loss = recipe.loss(model, tokens, labels)
            value = loss.item()
            log.write(json.dumps({"step": step, "loss": value, "at": time.time()}) + "\n")
            log.flush()
            if Path(job.stop).exists() or not value <= MAX_LOSS:  # also true for NaN
                return
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def main() -> None:
    train(msgspec.json.decode(sys.argv[1], type=Paced))
