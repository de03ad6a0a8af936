import argparse
import os
import pathlib
import pydoc_data

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

DIM, CONTEXT = 64, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.project = nn.Linear(DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256, bias=False)
        for name, weight in self.named_parameters():
            "norm" in name or (nn.init.zeros_(weight) if name.endswith("bias") else nn.init.normal_(weight, std=0.02))

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(rank=0, batch=8):
    text = pathlib.Path(pydoc_data.__path__[0], "topics.py").read_bytes()
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(rank)
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (batch, 1), generator=generator)
        yield text[starts + torch.arange(CONTEXT + 1)]


def make_model_and_batch():  # for `koopmon profile`
    torch.manual_seed(0)
    return Model(), next(batches(batch=32))[:, :-1]


def make_model_batch_and_loss():  # for `koopmon profile --max-lr`
    chunks = batches()

    def loss(model):  # of the next batch
        chunk = next(chunks)
        return F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())

    return *make_model_and_batch(), loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)  # plain `python train.py` is one rank
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 40, total_iters=40)
    for step, chunk in zip(range(options.steps), batches(dist.get_rank())):
        loss = F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        if dist.get_rank() == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
        if not loss < 50:
            raise SystemExit(f"diverged at step {step}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
