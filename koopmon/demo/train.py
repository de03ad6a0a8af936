"""An ordinary training script: a byte-level language model on the source of Python's own standard library.

The transformer is a Pre-LN decoder with GPT-2's initialisation (standard deviation 0.02, zero biases). It trains with
AdamW, a short warm-up and gradient clipping. The script does not use koopmon; `koopmon run` attaches from outside::

    torchrun --nproc-per-node 2 koopmon/demo/train.py --lr 0.05 --steps 200 --seed 0 --out run.jsonl

Each step is one JSON line: step, loss (mean over ranks, nats per byte), grad_norm (2-norm before clipping), lr (as
scheduled), seconds since the first step, diverged. The script stops after a divergence, with exit status 3: loss above
50, gradient norm above 500 without clipping, or either not finite.

Shapes: B sequences per rank, T bytes, D width, H heads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

MAX_LOSS = 50.0
MAX_GRAD_NORM = 500.0
DIVERGED = 3
VOCABULARY = 256
Norm = Literal["layer", "none"]
EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"})


def corpus() -> Tensor:
    """Return the source of the standard library without tests as one uint8 tensor, in the order of the paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    texts = [(root / path).read_bytes() for path in paths if EXCLUDED.isdisjoint(path.parts)]
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)


def make_norm(norm: Norm, width: int) -> nn.Module:
    return nn.LayerNorm(width) if norm == "layer" else nn.Identity()


class Block(nn.Module):
    """Causal attention and an MLP, each added to the residual stream, each with a LayerNorm before it."""

    def __init__(self, width: int, heads: int, norm: Norm) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = make_norm(norm, width), make_norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(h_BTD)).chunk(3, dim=-1)
        q_BHTd, k_BHTd, v_BHTd = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)
        h_BTD = h_BTD + self.proj(mixed.transpose(1, 2).flatten(2))
        h_BTD = h_BTD + self.down(functional.gelu(self.up(self.mlp_norm(h_BTD))))
        return h_BTD


class ByteTransformer(nn.Module):
    """Map bytes (B, T) to logits (B, T, 256)."""

    def __init__(self, width: int, layers: int, heads: int, context: int, norm: Norm = "layer") -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm) for _ in range(layers))
        self.norm = make_norm(norm, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        h_BTD = self.token(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            h_BTD = block(h_BTD)
        logits: Tensor = self.head(self.norm(h_BTD))
        return logits


def draw(data: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a batch of inputs and next bytes, each (B, T) int64, from random positions."""
    starts = torch.randint(len(data) - context - 1, (batch, 1), generator=generator)
    window = data[starts + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level transformer.")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--norm", choices=get_args(Norm), default="layer", help="normalisation before each layer")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no clipping")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=40, help="steps of linear warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sequences per rank")
    parser.add_argument("--context", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--out", type=Path, help="file for one JSON line per step; default: standard output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(args.seed)
    model = DistributedDataParallel(ByteTransformer(args.width, args.layers, args.heads, args.context, args.norm))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))
    data = corpus()
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + rank)

    log = None
    if rank == 0:
        log = args.out.open("w", encoding="utf-8") if args.out else sys.stdout
    status = 0
    started = time.monotonic()
    for step in range(args.steps):
        tokens, targets = draw(data, args.batch, args.context, generator)
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        # An infinite bound measures the norm without clipping.
        grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf))
        mean_loss = loss.detach() / world
        dist.all_reduce(mean_loss)
        value, lr = float(mean_loss), schedule.get_last_lr()[0]
        diverged = not (value <= MAX_LOSS and grad_norm <= (math.inf if args.clip else MAX_GRAD_NORM))
        if log is not None:
            seconds = round(time.monotonic() - started, 4)
            row = {"step": step, "loss": value, "grad_norm": grad_norm, "lr": lr, "seconds": seconds}
            print(json.dumps(row | {"diverged": diverged}), file=log, flush=True)
        if diverged:
            status = DIVERGED
            break
        optimizer.step()
        schedule.step()
    if log is not None and log is not sys.stdout:
        log.close()
    # gloo completes its last collective in a thread that needs the interpreter: an immediate exit would abort the
    # process.
    time.sleep(0.1)
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
