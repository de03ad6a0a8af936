"""Training of the fault campaign, and the same training without koopmon and without processes.

It has a tiny decoder, AdamW at a constant rate, and data that is a pure function of (step, rank). The log of a job is
compared with `follow`, which repeats the arithmetic of its ranks one after the other: losses and parameters must agree
in every bit.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Decoder

BATCH, CONTEXT, WIDTH, LAYERS, VOCABULARY = 4, 8, 16, 3, 11
RATE = 0.003
CHECKPOINT_EVERY = 40
"""Steps between checkpoints; a resumed job starts at a multiple."""
DIGEST_EVERY = 5
POISONS = {"nan": math.nan, "inf": math.inf}


class Tiny(nn.Module):
    """A decoder that adds the scalar `poison` to the output of its first block; 0 changes no bit."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(
            "pre", width=WIDTH, num_layers=LAYERS, num_heads=2, max_tokens=CONTEXT, vocabulary=VOCABULARY, seed=0
        )
        self.poison = 0.0
        self.decoder.blocks[0].register_forward_hook(self._add_poison)

    def _add_poison(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + self.poison if self.poison else output

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(tokens)
        return logits


def build() -> tuple[Tiny, torch.optim.Optimizer]:
    """Build the model and the optimizer, equal at each call."""
    model = Tiny()
    return model, torch.optim.AdamW(model.parameters(), lr=RATE)


def batch(step: int, rank: int) -> Tensor:
    """Draw the tokens (B, T) of one step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (BATCH, CONTEXT), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the next-token cross-entropy."""
    logits = model(tokens)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def digest(model: nn.Module) -> str:
    """Compute a checksum of every parameter."""
    total = 0
    for parameter in model.parameters():
        total = zlib.crc32(parameter.detach().numpy().tobytes(), total)
    return f"{total:08x}"


@dataclass(frozen=True, slots=True)
class Line:
    """One optimizer step in the log of a rank.

    It has the loss before the step, the rate of the optimizer, the number of changes in force after it (-1 if the
    script does not use koopmon), and its end in seconds of the monotonic clock. `digest` is empty except for every
    DIGEST_EVERY steps.
    """

    step: int
    loss: str
    rate: str
    version: int
    at: float
    digest: str

    def __str__(self) -> str:
        return f"{self.step} {self.loss} {self.rate} {self.version} {self.at:.4f} {self.digest or '-'}\n"


def read_lines(path: Path) -> list[Line]:
    """Return the complete lines of a rank's log. A kill may truncate the last line."""
    return [_line(text) for text in path.read_text().split("\n")[:-1]]


def last_line(path: Path) -> Line | None:
    """Return the last complete line of a rank's log; None without one."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 400))
        texts = file.read().decode().split("\n")[:-1]
    return _line(texts[-1]) if texts else None


def _line(text: str) -> Line:
    step, loss, rate, version, at, checksum = text.split(" ")
    return Line(int(step), loss, rate, int(version), float(at), "" if checksum == "-" else checksum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """One launch of a job: the steps `first` to `last` by `world` ranks.

    `scales[step]` is the scale on the rate from that step on; `poisons` has the steps with poisoned activations.
    """

    first: int
    last: int
    world: int
    scales: Mapping[int, float] = field(default_factory=dict)
    poisons: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expected:
    """Required log of every rank at one step."""

    losses: tuple[str, ...]
    digest: str


def follow(stretches: Sequence[Stretch]) -> Iterator[dict[int, Expected]]:
    """Repeat the steps of each stretch in this process. A stretch that starts after 0 continues from the checkpoint
    there.
    """
    saved: dict[int, tuple[dict[str, object], dict[str, object]]] = {}
    resumed = {stretch.first for stretch in stretches}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for stretch in stretches:
            model, optimizer = build()
            if stretch.first:
                held = copy.deepcopy(saved[stretch.first])
                model.load_state_dict(held[0])
                optimizer.load_state_dict(held[1])
            scale, found = 1.0, {}
            # One step further: a rank may be killed between a checkpoint and the end of the next step.
            for step in range(stretch.first, stretch.last + 2):
                if step in resumed and step % CHECKPOINT_EVERY == 0:
                    saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                if step > stretch.last:
                    break
                scale = stretch.scales.get(step, scale)
                found[step] = _step(model, optimizer, step, stretch.world, scale, stretch.poisons.get(step, ""))
            yield found
    finally:
        torch.set_num_threads(threads)


def _step(model: Tiny, optimizer: torch.optim.Optimizer, step: int, world: int, scale: float, poison: str) -> Expected:
    """Take one step of all ranks, with DistributedDataParallel's mean of gradients written out."""
    parameters = list(model.parameters())
    losses, means = [], [torch.zeros_like(each) for each in parameters]
    model.poison = POISONS.get(poison, 0.0)
    for rank in range(world):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, rank))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()).hex())
        for mean, parameter in zip(means, parameters, strict=True):
            assert parameter.grad is not None, "every parameter is used"
            mean += parameter.grad * (1.0 / world)
    model.poison = 0.0
    for mean, parameter in zip(means, parameters, strict=True):
        parameter.grad = mean
    for group in optimizer.param_groups:
        group["lr"] = RATE * scale
    if all(math.isfinite(float.fromhex(loss)) for loss in losses):
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return Expected(tuple(losses), digest(model) if step % DIGEST_EVERY == 0 else "")
