"""Training loops in the forms of public projects, in plain torch: `python loops.py NAME` prints each loss exactly."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot, scaled_dot_product_attention, silu

D, V, T = 32, 24, 16
STEPS = 30


class Attention(nn.Module):
    """Self-attention without the residual addition."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.causal = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).flatten(2))


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Block(nn.Module):
    """A pre-normalised block; with a condition its scale, shift and gates are computed, and are 0 at first (adaLN)."""

    def __init__(self, causal: bool, conditioned: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D, elementwise_affine=not conditioned), Attention(causal)
        self.norm2, self.mlp = nn.LayerNorm(D, elementwise_affine=not conditioned), feed_forward()
        if conditioned:
            self.modulation = nn.Linear(D, 4 * D)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        scale1, gate1, scale2, gate2 = self.modulation(condition)[:, None].chunk(4, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2))


class Language(nn.Module):
    """A causal language model with tied embeddings."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, D), "h": nn.ModuleList()})
        self.transformer["h"].extend(Block(causal=True) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return self.head(self.norm(x))


def texts() -> Tensor:
    return torch.randint(V, (64, 1)).add(torch.arange(T + 1) * 3).remainder(V)


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def pretraining(model: Language) -> Iterator[Tensor]:
    """Micro steps, a scaler, a rate that the loop sets, evaluation before the first step, checkpoints: as nanoGPT."""
    matrices = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    scaler, data = torch.amp.GradScaler("cpu", enabled=False), texts()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 5, 0.1 + 0.9 * math.cos(0.5 * math.pi * step / STEPS))
        if step % 10 == 0:
            model.eval()
            with torch.no_grad():
                yield language_loss(model, data)
            model.train()
            copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        for micro in range(2):
            loss = language_loss(model, data[16 * micro :][:16]) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield loss


def two_optimizers(model: Language) -> Iterator[Tensor]:
    """Muon for the matrices of the blocks, AdamW for the rest, rates from `initial_lr`: as nanochat."""
    matrices = [each for each in model.transformer["h"].parameters() if each.dim() > 1]
    known = set(map(id, matrices))
    rest = [each for each in model.parameters() if id(each) not in known]
    optimizers = [torch.optim.AdamW(rest, lr=5e-3, fused=True), torch.optim.Muon(matrices, lr=0.02)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    data = texts()
    for step in range(STEPS):
        loss = language_loss(model, data[16 * (step % 4) :][:16])
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, (STEPS - step) / 12)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        yield loss


def reinforcement(model: Language) -> Iterator[Tensor]:
    """Sampling from the policy, a frozen reference, two updates on the same samples: as GRPO."""
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def log_probabilities(policy: nn.Module, tokens: Tensor) -> Tensor:
        return -cross_entropy(policy(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")

    for _ in range(STEPS // 2):
        with torch.no_grad():
            tokens = torch.randint(V, (16, 1))
            for _ in range(8):
                tokens = torch.cat([tokens, model(tokens)[:, -1].softmax(-1).multinomial(1)], 1)
            reward = tokens.float().diff(dim=1).gt(0).float().mean(1)
            advantage = ((reward - reward.mean()) / (reward.std() + 1e-4))[:, None]
            before, fixed = log_probabilities(model, tokens), log_probabilities(reference, tokens)
        for _ in range(2):
            now = log_probabilities(model, tokens)
            ratio = (now - before).exp()
            clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            loss = (0.04 * ((fixed - now).exp() - (fixed - now) - 1) - clipped).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal=False, conditioned=True) for _ in range(4))
        self.time, self.last = nn.Linear(1, D), nn.Linear(D, D)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        condition = silu(self.time(time[:, None]))
        for block in self.blocks:
            x = block(x, condition)
        return self.last(x)


def diffusion(model: Diffusion) -> Iterator[Tensor]:
    """Blocks that are identities at first, and an average of the weights beside the model: as DiT."""
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(STEPS):
        x, noise, time = torch.randn(16, T, D).cumsum(1), torch.randn(16, T, D), torch.rand(16)
        mixed = (1 - time)[:, None, None] * x + time[:, None, None] * noise
        loss = mse_loss(model(mixed, time), noise - x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        yield loss
    yield next(average.parameters()).detach().sum()


class Images(nn.Module):
    """A vision transformer on ready patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Linear(12, D), nn.LayerNorm(D), nn.Linear(D, 10)
        self.blocks = nn.Sequential(*(Block(causal=False) for _ in range(4)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(images))).mean(1))


def classification(model: Images) -> Iterator[Tensor]:
    """Mixed images and labels, an averaged model, a rate per step: as timm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS)
    average = torch.optim.swa_utils.AveragedModel(model)
    images, labels = torch.randn(64, T, 12), one_hot(torch.randint(10, (64,)), 10).float()
    for step in range(STEPS):
        part, share = slice(16 * (step % 4), 16 * (step % 4) + 16), float(torch.rand(()))
        mixed = images[part].lerp(images[part].flip(0), share), labels[part].lerp(labels[part].flip(0), share)
        loss = cross_entropy(model(mixed[0]), mixed[1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        yield loss


LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Iterator[Tensor]]]] = {
    "pretraining": (Language, pretraining),
    "two_optimizers": (Language, two_optimizers),
    "reinforcement": (Language, reinforcement),
    "diffusion": (Diffusion, diffusion),
    "classification": (Images, classification),
}


def wait_for_monitor() -> None:
    """Wait for the monitor, which starts beside this short script."""
    ready = Path(os.environ["KOOPMON_ENDPOINT"].removeprefix("ipc://")).with_name("ready")
    end = time.monotonic() + 60.0
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)


def main(name: str) -> None:
    torch.manual_seed(0)
    guarded = "KOOPMON_ENDPOINT" in os.environ
    if guarded:
        wait_for_monitor()
    make, loop = LOOPS[name]
    model = make()
    for loss in loop(model):
        print(float(loss.detach()).hex(), flush=True)
        time.sleep(0.1 if guarded else 0.0)  # for the monitor's answers
    weights = b"".join(each.numpy().tobytes() for each in model.state_dict().values())
    print(hashlib.sha256(weights).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
