"""Job of the fault campaign: an ordinary training with checkpoints that logs each step and reads orders.

It has one process, or several under torchrun. Under `koopmon run` it does not use koopmon itself; with --attach it
attaches. Orders are JSON lines in a file that is read before every step: {"do": "end", "step": S} ends the training
before step S on every rank, and {"do": "poison", "step": S, "value": "nan"} poisons the activations of step S. With
--phases the job is a series of short trainings, each attached again at {"do": "phase", "number": K}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import benchmarks.fault_campaign.clock  # noqa: F401 - before koopmon: it may falsify the clock
from benchmarks.fault_campaign.training import (
    CHECKPOINT_EVERY,
    DIGEST_EVERY,
    POISONS,
    Line,
    batch,
    build,
    digest,
    loss_of,
)
from tests.agent.models import record_rates

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Orders:
    """Orders of the campaign for this rank."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._read = path, 0
        self.end = math.inf
        self.poisons: dict[int, str] = {}
        self.phase = -1

    def look(self) -> None:
        if self._path is None or not self._path.exists() or self._path.stat().st_size == self._read:
            return
        with self._path.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole)
        for order in map(json.loads, whole.splitlines()):
            if order["do"] == "end":
                self.end = order["step"]
            elif order["do"] == "poison":
                self.poisons[order["step"]] = order["value"]
            elif order["do"] == "phase":
                self.phase = order["number"]


def attached(model: Any, optimizer: Any, args: argparse.Namespace, run: str | None) -> Any:
    if not args.attach:
        return None
    import koopmon

    return koopmon.attach(model, optimizer, run=run)


def checkpoint(path: Path, step: int, model: Any, optimizer: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def train(args: argparse.Namespace, orders: Orders, log: str, run: str | None = None, steps: float = math.inf) -> None:
    plain, optimizer = build()
    first, saved = 0, Path(f"{args.out}.pt")
    if args.resume and saved.exists():
        held = torch.load(saved, weights_only=True)
        plain.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"]
    model: Any = DistributedDataParallel(plain) if WORLD > 1 else plain
    agent = attached(model, optimizer, args, run)
    rates: list[float] = []
    Path(f"{args.out}.{log}.{RANK}.pid").write_text(str(os.getpid()))
    record_rates(optimizer, rates)
    with open(f"{args.out}.{log}.{RANK}", "w", buffering=1) as file:
        step = first
        while step < steps:
            orders.look()
            if step >= orders.end:
                break
            if args.resume and RANK == 0 and step % CHECKPOINT_EVERY == 0:
                checkpoint(saved, step, plain, optimizer)
            plain.poison = POISONS.get(orders.poisons.get(step, ""), 0.0)
            optimizer.zero_grad()
            loss = loss_of(model, batch(step, RANK))
            loss.backward()
            if not math.isfinite(loss):  # as many loops do: such a step changes nothing
                optimizer.zero_grad(set_to_none=True)
            optimizer.step()
            if agent is not None:
                agent.log(loss=loss)
            checksum = digest(plain) if step % DIGEST_EVERY == 0 else ""
            version = -1 if agent is None or agent._runtime is None else agent._runtime.lifecycle.state.control.version
            file.write(
                str(Line(step, float(loss.detach()).hex(), rates[-1].hex(), version, time.monotonic(), checksum))
            )
            step += 1
            time.sleep(args.pace)
    if agent is not None:
        agent.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="beginning of the logs' names: OUT.LAUNCH-RESTART.RANK")
    parser.add_argument("--orders", type=Path)
    parser.add_argument("--launch", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.01, help="seconds to rest after each step")
    parser.add_argument("--attach", action="store_true")
    parser.add_argument("--resume", action="store_true", help="write checkpoints, and go on from one")
    parser.add_argument("--phase-steps", type=int, default=0)
    parser.add_argument("--phases", help="JSON list: [run, place where the adapter raises, good calls before that]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if WORLD > 1:
        dist.init_process_group("gloo")
    orders = Orders(args.orders)
    if args.phases:
        from benchmarks.fault_campaign.adapter import FAULTY

        for number, (run, FAULTY.place, FAULTY.calls) in enumerate(json.loads(args.phases)):
            while orders.phase < number:
                time.sleep(0.005)
                orders.look()
            train(args, orders, f"{number}-0", run, args.phase_steps)
    else:
        train(args, orders, f"{args.launch}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
    if WORLD > 1:
        dist.barrier()
        time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
