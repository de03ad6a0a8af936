"""Small residual models for the taps, in several forms. B batch, T tokens, D width, L blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koopmon.agent.circuit_breaker import CircuitBreaker

B, T, D, L = 4, 8, 16, 3
VOCABULARY = 11


class Block(nn.Module):
    """h + f(h); with `in_place` the sum is written into the input."""

    def __init__(self, width: int, in_place: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.in_place = in_place

    def forward(self, h: Tensor) -> Tensor:
        mixed = h + 0.3 * self.attention(h, h, h, need_weights=False)[0]
        change = self.down(torch.tanh(self.up(mixed)))
        return h.add_(change) if self.in_place else h + change


class Model(nn.Module):
    """Tokens (B, T) to logits. `run` calls a block, as `checkpointed` does under activation checkpointing."""

    def __init__(
        self,
        run: Callable[[nn.Module, Tensor], Tensor] | None = None,
        *,
        in_place: bool = False,
        width: int = D,
        layers: int = L,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, in_place) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)
        self.run = run

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embedding(tokens) * 1.0
        for block in self.blocks:
            h = block(h) if self.run is None else self.run(block, h)
        out: Tensor = self.head(h)
        return out


def checkpointed(block: nn.Module, h: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, h, use_reentrant=False)
    return out


def checkpointed_reentrant(block: nn.Module, h: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, h, use_reentrant=True)
    return out


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    """Build a model with equal parameters for equal seeds."""
    torch.manual_seed(seed)
    return Model(**options).to(dtype)


def batch(step: int, rank: int = 0) -> Tensor:
    """Draw the tokens (B, T) of one step and rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(VOCABULARY, (B, T), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Compute the next-token cross-entropy as a scalar."""
    logits = model(tokens, **kwargs)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int = 0) -> float:
    """Take one step of training; return the loss before it."""
    loss = loss_of(model, batch(step, rank))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def record_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Add the rate that moves the weights to `rates` in each step. A hook of the user's would see the user's rate."""
    hook = CircuitBreaker("a record of rates").hook(lambda _, args, __: rates.append(args[0].param_groups[0]["lr"]))
    optimizer.register_step_pre_hook(hook)


def paced(agent: Any, monitor: Any) -> Callable[[], None]:
    """Return a function that waits until every snapshot taken since now has arrived at `monitor`."""
    runtime, taken = agent._runtime, []
    handle = runtime.on_snapshot_ready

    def count(snapshot: Any) -> None:
        taken.append(snapshot.training.step)
        handle(snapshot)

    runtime.on_snapshot_ready = count
    return lambda: monitor.wait(lambda: len(monitor.shards) >= len(taken))


def pretend_compiled(monkeypatch: Any, answer: bool) -> None:
    """Let the agent see that this process has called torch.compile, or that it has not."""
    for module in ("missed_snapshots", "taps", "training_forwards"):
        monkeypatch.setattr(f"koopmon.agent.capture.{module}.compiles", lambda: answer)
