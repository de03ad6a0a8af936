"""One rank of several small trainings over gloo, one after the other. It writes its results as JSON. The tests start
it.

Usage: ddp.py OUT PHASES, where PHASES is a JSON list of `Phase` fields; writes OUT.RANK.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import koopmon
from koopmon.spectral import kss_basis, kss_gradient, kss_loss
from koopmon.token_sampling import order_rows, take_rows
from tests.agent.models import B, T, batch, build, loss_of, record_rates


@dataclass
class Phase:
    """One training. `endpoint` "" trains without koopmon; `only_rank` attaches on that rank alone.

    - `ddp` False: the ranks train separately, connected by koopmon only. `uneven`: number of steps that rank 1 lacks.
    - `hang_step`, `hang_seconds`: rank 1 stops itself before that step.
    - `early`: attach before the ranks have met and before DDP wraps the model; for the first phase only.
    - `alpha`: check the KSS gradient of one step against the explicit loss, averaged over ranks.
    - `shard`: FSDP2 instead of DDP.
    - `fail_step`: the agent of rank 1 fails before that step.
    - `lag`: rank `lagging` leaves out every seventh update ("skip"), takes every third one only ("accumulate"), or
      attaches 20 steps later ("late"). With "join", it has 20 batches less inside DDP's join().
    """

    steps: int = 60
    endpoint: str = ""
    run: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    pause: float = 0.0
    accumulate: int = 1
    only_rank: int | None = None
    ddp: bool = True
    uneven: int = 0
    hang_step: int = -1
    hang_seconds: float = 0.0
    alpha: float = 0.0
    close: bool = True
    early: bool = False
    shard: bool = False
    fail_step: int = -1
    lag: str = ""
    lagging: int = 1

    def leaves_out(self, step: int, rank: int) -> bool:
        """Return True if the rank takes no update in iteration `step`."""
        if rank != self.lagging:
            return False
        return (self.lag == "skip" and step % 7 == 5) or (self.lag == "accumulate" and step % 3 != 2)


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for parameter in model.parameters():
        state.update(whole(parameter.detach()).numpy().tobytes())
    return state.hexdigest()


def whole(tensor: Any) -> Tensor:
    """Return a whole tensor, also if this rank holds a shard of it."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def sharded(model: nn.Module) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def stop_for(seconds: float) -> None:
    """SIGSTOP to this process, SIGCONT after a while."""
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def train(phase: Phase, rank: int) -> dict[str, Any]:
    model: nn.Module = build()
    if phase.shard:
        model = sharded(model)
    elif phase.ddp and not phase.early:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    agent = None
    late = phase.lag == "late" and rank == phase.lagging
    if phase.endpoint and phase.only_rank in (None, rank) and not late:
        agent = koopmon.attach(model, optimizer, endpoint=phase.endpoint, run=phase.run, config=phase.config)
    if phase.early:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    seen: list[float] = []

    def note_rates() -> None:
        record_rates(optimizer, seen)

    note_rates()
    trace: dict[str, list[Any]] = {
        "losses": [],
        "scales": [],
        "alphas": [],
        "ready": [],
        "seconds": [],
        "checkpoints": [],
    }
    uneven = contextlib.ExitStack()
    if phase.lag == "join":
        uneven.enter_context(model.join())
    lacks = phase.uneven if rank == 1 else 20 if phase.lag == "join" and rank == phase.lagging else 0
    for step in range(phase.steps - lacks):
        if rank == 1 and step == phase.hang_step:
            stop_for(phase.hang_seconds)
        if rank == 1 and step == phase.fail_step and agent is not None and agent._runtime is not None:
            agent._runtime.breaker.trip("a test", RuntimeError("a test"))
        if late and step == 20:
            agent = koopmon.attach(model, optimizer, endpoint=phase.endpoint, run=phase.run, config=phase.config)
            note_rates()  # after koopmon's hook
        time.sleep(phase.pause)
        optimizer.zero_grad()
        for micro in range(phase.accumulate):
            loss = loss_of(model, batch(step * phase.accumulate + micro, rank))
            (loss / phase.accumulate).backward()
            trace["losses"].append(float(loss.detach()))
        base = schedule.get_last_lr()[0]
        started = time.monotonic()
        leaves_out = phase.leaves_out(step, rank)
        if not leaves_out:
            optimizer.step()
        trace["seconds"].append(time.monotonic() - started)
        schedule.step()
        trace["scales"].append(None if leaves_out else seen[-1] / base)
        if agent is not None:
            agent.log(loss=loss)
            status = agent.status()
            trace["ready"].append(status["control_ready"])
            trace["alphas"].append(status["applied"]["kss"]["alpha"])
            if agent.should_checkpoint:
                trace["checkpoints"].append(step)
            if agent.should_stop:
                break
    uneven.close()
    status = None if agent is None else agent.status()
    if agent is not None and phase.close:
        agent.close()
    return {**trace, "digest": digest(model), "status": status}


def explicit_gradients(phase: Phase, settings: Any, step: int, rank: int) -> list[Tensor]:
    """Compute gradients of (loss + alpha * kss) of this rank, averaged over ranks by hand."""
    model = build(dtype=torch.float64)
    tokens = batch(step, rank)
    rows, _ = order_rows(B * T, settings.num_samples, seed=0, step=step, data_rank=rank)
    states = [model.embedding(tokens) * 1.0]
    for block in model.blocks:
        states.append(block(states[-1]))
    penalty = torch.zeros((), dtype=torch.float64)
    for x, y in itertools.pairwise(states):
        x, y = take_rows(x, rows), take_rows(y, rows)
        basis = kss_basis(x.detach(), settings.svd_rank, 0)
        if kss_gradient(x.detach(), y.detach(), basis).ok:  # a layer with ill-conditioned eigenvectors is excluded
            penalty = penalty + kss_loss(x, y, basis=basis, tau_u=settings.tau_u, beta=settings.beta)
    (loss_of(model, tokens) + phase.alpha * penalty / len(model.blocks)).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients


def check_kss(phase: Phase, rank: int) -> dict[str, Any]:
    """Compare the gradients of a frozen model under DDP or FSDP2: plain until KSS is on, then with the explicit KSS."""
    settings = koopmon_settings(phase.alpha)
    plain = build(dtype=torch.float64)
    model = sharded(plain) if phase.shard else DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = koopmon.attach(model, optimizer, endpoint=phase.endpoint, run=phase.run, config=phase.config)
    errors = []
    for step in range(phase.steps):
        time.sleep(phase.pause)
        in_force = agent.status()["applied"]["kss"]["alpha"]
        optimizer.zero_grad()
        loss_of(model, batch(step, rank)).backward()
        if in_force:
            expected = explicit_gradients(phase, settings, step, rank)
            found = [whole(parameter.grad) for parameter in model.parameters()]
            difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
            errors.append((difference / sum(float(b.square().sum()) for b in expected)) ** 0.5)
        optimizer.step()
        if len(errors) > 3:
            break
    status = agent.status()
    agent.close()
    return {"errors": errors, "status": status}


def koopmon_settings(alpha: float) -> Any:
    from koopmon.wire.messages import KssSettings

    return KssSettings(alpha=alpha, svd_rank=6, num_samples=24, tau_u=0.9, beta=0.5)


def main() -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    phases = [Phase(**options) for options in json.loads(sys.argv[2])]
    if not phases[0].early:
        dist.init_process_group("gloo")
    results = []
    for phase in phases:
        if not phase.early:
            dist.barrier()
        results.append(check_kss(phase, rank) if phase.alpha else train(phase, rank))
        Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))
    time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
