"""Training script of a user, without koopmon: DDP, its own model without normalisation, its own loop, LambdaLR.

It trains a byte-level language model on the English prose of Python's help topics. Options select the learning rate,
the seed and, for the healthy comparison, a normalised model. Each step is one JSON line; the last line has the outcome
and a digest of the parameters. The exit status is 3 after a divergence: loss above 50, gradient norm above 500, or
either not finite.
"""

import argparse
import hashlib
import json
import math
import pathlib
import pydoc_data
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name users give it)
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817 (the usual name)


def read_bytes():
    source = pathlib.Path(pydoc_data.__path__[0], "topics.py").read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long()


class Mix(nn.Module):
    def __init__(self, dim, num_heads, norm):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(dim) if norm else nn.Identity()
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.in_proj(self.norm1(x)).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class ProseModel(nn.Module):
    def __init__(self, dim=128, depth=4, num_heads=4, context=64, norm=False):
        super().__init__()
        self.emb = nn.Embedding(256, dim)
        self.pos = nn.Parameter(torch.empty(context, dim))
        self.trunk = nn.ModuleList(Mix(dim, num_heads, norm) for _ in range(depth))
        self.final = nn.LayerNorm(dim) if norm else nn.Identity()
        self.out = nn.Linear(dim, 256, bias=False)
        nn.init.normal_(self.pos, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids):
        x = self.emb(ids) + self.pos[: ids.shape[1]]
        for block in self.trunk:
            x = block(x)
        return self.out(self.final(x))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--norm", action="store_true")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(args.seed)
    model = DDP(ProseModel(norm=args.norm))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    text = read_bytes()
    picks = torch.Generator().manual_seed(1000 * args.seed + rank)
    began = time.monotonic()
    end = "finished"
    with open(args.out if rank == 0 else "/dev/null", "w") as log:
        for step in range(args.steps):
            starts = torch.randint(0, len(text) - 65, (args.batch,), generator=picks)
            chunk = torch.stack([text[s : s + 65] for s in starts.tolist()])
            logits = model(chunk[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            mean_loss = loss.detach().clone()
            dist.all_reduce(mean_loss)
            value = mean_loss.item() / dist.get_world_size()
            line = {"step": step, "loss": value, "grad_norm": grad_norm, "lr": schedule.get_last_lr()[0]}
            print(json.dumps({**line, "seconds": time.monotonic() - began}), file=log, flush=True)
            if not (math.isfinite(value) and math.isfinite(grad_norm)) or value > 50 or grad_norm > 500:
                end = "diverged"
                break
            optimizer.step()
            schedule.step()
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        last = {"end": end, "digests": [bytes(one.tolist()).hex() for one in every]}
        print(json.dumps(last), file=log, flush=True)
    time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
    dist.destroy_process_group()
    raise SystemExit(3 if end == "diverged" else 0)


if __name__ == "__main__":
    main()
