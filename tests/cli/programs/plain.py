"""A user's script without torchrun: alone, or as one of several Slurm tasks. Its children are not ranks."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CHILD = "import torch; m = torch.nn.Sequential(torch.nn.Linear(2, 2)); torch.optim.SGD(m.parameters(), lr=0.1)"


def wait_for_monitor():
    """Wait for the monitor of `koopmon run`, which starts beside this short script."""
    endpoint, end = os.environ.get("KOOPMON_ENDPOINT"), time.monotonic() + 60
    while endpoint and time.monotonic() < end:
        if (Path(endpoint.removeprefix("ipc://")).parent / "ready").exists():
            return
        time.sleep(0.05)


def main():
    torch.set_num_threads(1)
    wait_for_monitor()
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    trunk = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(256, 32), trunk, nn.Linear(32, 256))
    if os.environ.get("LATE") or tasks == 1:  # the ranks meet after the optimizer was created
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if tasks > 1:
        dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(os.environ["SLURM_PROCID"]), world_size=tasks)
        model = nn.parallel.DistributedDataParallel(model)
    if not (os.environ.get("LATE") or tasks == 1):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.randint(256, (160, 33)))
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context="spawn" if tasks == 1 else "fork")
    for (tokens,) in loader:
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.02)
    if tasks == 1:
        subprocess.run([sys.executable, "-c", CHILD], check=True)
    digest = hashlib.sha256(b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()))
    print(digest.hexdigest(), flush=True)
    if tasks > 1:
        time.sleep(0.1)  # gloo releases its last collective in a thread that needs the interpreter
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
