"""A training in which one step makes the weights NaN or infinite, until its loss is finite again or for MOST steps.

Usage: nan_batch.py OUT LAYERS KIND. LAYERS is norm or plain. KIND is `loss` (a loss of NaN), `gradient` (an infinite
gradient in the last rank alone) or `weight` (an infinite weight). Writes OUT.RANK: the steps of the fault and of the
first finite loss after it, and a digest of the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FAULT, MOST, AFTER = 40, 1500, 10
WIDTH, CONTEXT, VOCABULARY = 32, 16, 64


class Block(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.mlp(self.norm(x))
        return changed


class Model(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def main() -> None:
    out, layers, kind = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model: nn.Module = Model(layers == "norm")
    if size > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights = list(model.parameters())
    data = torch.Generator().manual_seed(rank)
    healed: int | None = None
    hook = None
    for step in range(MOST):
        tokens = torch.randint(VOCABULARY, (8, CONTEXT + 1), generator=data)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        if step == FAULT and kind == "loss":
            loss = loss * math.nan
        if step == FAULT and kind == "gradient" and rank == size - 1:
            hook = weights[-1].register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if hook is not None:
            hook.remove()
            hook = None
        if step == FAULT and kind == "weight":
            with torch.no_grad():
                weights[0][0, 0] = math.inf
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        told = loss.detach().clone()
        if size > 1:
            dist.all_reduce(told)  # all ranks end at the same step
        if step > FAULT and healed is None and math.isfinite(told.item()):
            healed = step
        if healed is not None and step >= healed + AFTER:
            break
        time.sleep(0.005)
    digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in weights)).hexdigest()
    finite = all(bool(each.isfinite().all()) for each in weights)
    Path(f"{out}.{rank}").write_text(json.dumps({"healed": healed, "finite": finite, "digest": digest}))
    if size > 1:
        time.sleep(0.1)  # gloo's threads may abort a process that ends at once
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
