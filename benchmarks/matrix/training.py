"""One training of a cell of the support matrix, with one loop for all layouts, and its plain equivalent."""

from __future__ import annotations

import hashlib
import itertools
from contextlib import suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks.matrix.cells import PIPELINED, Cell
from benchmarks.matrix.model import (
    B,
    Decoder,
    L,
    T,
    autocast,
    checkpointed,
    compiled,
    data_rank,
    loss_of,
    plain,
    states_of,
    synchronising,
    tokens_at,
    wrapped,
)
from koopmon.spectral import kss_basis, kss_gradient, kss_loss
from koopmon.token_sampling import order_rows, take_rows
from koopmon.wire.messages import KssSettings

LEARNING_RATE = 0.05
MICROBATCHES = 2
"""Number of microbatches of a pipeline's schedule."""
State = dict[str, Tensor]


class Training:
    """Model wrapped for `cell`, with its optimizer and its loop, on this rank."""

    def __init__(self, cell: Cell, rank: int) -> None:
        self.cell = cell
        self.data_rank = data_rank(cell, rank)
        self._rank = rank
        self.schedule: Any = None
        self.model = self._stage() if cell.parallel in PIPELINED else wrapped(cell)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.scaler: Any = None
        if cell.precision == "scaler":
            make = ShardedGradScaler if cell.parallel == "fsdp1" else torch.amp.GradScaler
            self.scaler = make(device="cpu", init_scale=256.0, growth_interval=3)

    def step(self, step: int) -> list[float]:
        """Take one optimizer step; return the losses of its microbatches that this rank has."""
        self.optimizer.zero_grad()
        if self.schedule is not None:
            losses = self._run_schedule(step)
        else:
            losses = [self._microbatch(step, micro) for micro in range(self.cell.accumulate)]
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return losses

    def _microbatch(self, step: int, micro: int) -> float:
        tokens = tokens_at(step, micro, self.data_rank)
        with synchronising(self.model, micro == self.cell.accumulate - 1):
            with autocast(self.cell):
                loss = loss_of(self.model(tokens), tokens)
            self._scaled(loss / self.cell.accumulate).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else cast(Tensor, self.scaler.scale(loss))

    # Pipelines.

    def _stage(self) -> nn.Module:
        model = checkpointed(plain(), self.cell)
        half = L // 2
        if self._rank == 0:
            model.norm = model.head = None
            model.blocks = model.blocks[:half]
        else:
            model.embedding = model.position = None
            model.blocks = model.blocks[half:]
        compiled(model, self.cell)
        stage: nn.Module = model
        if self.cell.compile in ("whole", "fullgraph"):
            stage = cast(nn.Module, torch.compile(model, fullgraph=self.cell.compile == "fullgraph"))
        kind = ScheduleGPipe if self.cell.parallel == "pp-gpipe" else Schedule1F1B
        piped = PipelineStage(stage, self._rank, 2, torch.device("cpu"))
        self.schedule = kind(piped, MICROBATCHES, loss_fn=lambda logits, tokens: self._scaled(loss_of(logits, tokens)))
        return stage

    def _run_schedule(self, step: int) -> list[float]:
        tokens = tokens_at(step, 0, 0)
        with autocast(self.cell):
            if self._rank == 0:
                self.schedule.step(tokens)
                return []
            losses: list[Tensor] = []
            self.schedule.step(target=tokens, losses=losses)
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return [float(loss.detach()) / scale for loss in losses]

    # Results after the training.

    def parameters(self) -> State:
        """Return all parameters of the whole model by the plain model's names; a collective."""
        if self.schedule is None:
            options = StateDictOptions(full_state_dict=True)
            found = get_model_state_dict(self.model, options=options)
            # Compiled blocks inside FSDP1 keep the compiler's name for the wrapped module.
            return {name.replace("_orig_mod.", ""): cast(Tensor, each).detach().clone() for name, each in found.items()}
        return self._gathered()

    def _gathered(self) -> State:
        """Collect the parameters of a pipeline: each stage sends its own to the others."""
        mine = {name.removeprefix("_orig_mod."): value for name, value in self.model.state_dict().items()}
        mine = {name.replace("._orig_mod", ""): value for name, value in mine.items()}
        found: State = {}
        for name, value in plain().state_dict().items():
            owner, local = int(name.startswith(("norm", "head"))), name
            if name.startswith("blocks."):
                _, number, rest = name.split(".", 2)
                owner, local = divmod(int(number), L // 2)[0], f"blocks.{int(number) % (L // 2)}.{rest}"
            whole = mine[local].clone() if owner == self._rank else torch.empty_like(value)
            dist.broadcast(whole, owner)
            found[name] = whole
        return found


def digest(state: State) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def reference(state: State) -> Decoder:
    """Build the plain model with these parameters."""
    model = plain()
    model.load_state_dict(state)
    return model


def mixed(cell: Cell, model: Decoder) -> Decoder:
    """Convert `model` to the precision of the layout."""
    return model.to(torch.bfloat16) if cell.parallel == "fsdp2-mixed" else model


def states_at(cell: Cell, state: State, tokens: Tensor) -> list[Tensor]:
    """Compute h_0 ... h_L, each (B, T, D), of the plain model with these parameters."""
    with torch.no_grad(), autocast(cell):
        return states_of(mixed(cell, reference(state)), tokens)


def gradients(
    cell: Cell, state: State, settings: KssSettings, step: int, updates: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the task and of alpha * mean KSS, flat, on the plain model, averaged over ranks.

    The batch is that of `step`. KSS draws its tokens by the number of updates before it. A gradient scaler skips the
    update of a step whose gradients overflow.
    """
    found = []
    for part in ("task", "kss"):
        model = reference(state)
        run = mixed(cell, reference(state))
        for micro in range(cell.accumulate):
            tokens = tokens_at(step, micro, data_rank(cell, rank))
            with autocast(cell):
                states = states_of(run, tokens)
                assert run.head is not None
                assert run.norm is not None
                loss = loss_of(run.head(run.norm(states[-1])), tokens)
            value = loss if part == "task" else _penalty(states, settings, updates, data_rank(cell, rank))
            (value / cell.accumulate).backward()  # type: ignore[no-untyped-call]
        for own, other in zip(model.parameters(), run.parameters(), strict=True):
            own.grad = torch.zeros_like(own) if other.grad is None else other.grad.float()
        flat = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in model.parameters()])
        if dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        found.append(flat)
    return found[0], found[1]


def _penalty(states: list[Tensor], settings: KssSettings, updates: int, rank: int) -> Tensor:
    rows, _ = order_rows(B * T, settings.num_samples, seed=0, step=updates, data_rank=rank)
    penalty = torch.zeros(())
    for x, y in itertools.pairwise(states):
        x, y = take_rows(x, rows).float(), take_rows(y, rows).float()
        basis = kss_basis(x.detach(), settings.svd_rank, 0)
        if kss_gradient(x.detach(), y.detach(), basis, tau_u=settings.tau_u, beta=settings.beta).ok:
            penalty = penalty + kss_loss(x, y, basis=basis, tau_u=settings.tau_u, beta=settings.beta)
    return settings.alpha * penalty / (len(states) - 1)


def flat(state: State) -> Tensor:
    """Return the parameters in the order of the plain model's."""
    return torch.cat([state[name].float().flatten() for name, _ in plain().named_parameters()])


def forget_compiled() -> None:
    """Reset the compiler, so that each training compiles again."""
    with suppress(AttributeError):
        torch._dynamo.reset()
