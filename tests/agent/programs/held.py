"""A training whose interpreter is blocked by a C call: it prints a line when attached, blocks, and trains to its end.

Arguments: endpoint, method (`sleep` or `power`), seconds.
"""

from __future__ import annotations

import ctypes
import sys
import time

import torch

import koopmon
from tests.agent.models import build, train_step


def hold(how: str, seconds: float) -> None:
    """Stay in C for the given time without releasing the interpreter."""
    if how == "sleep":
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    else:  # one multiplication of integers is one C call
        until, digits = time.monotonic() + seconds, 1 << 18
        while time.monotonic() < until:
            number, began = 3**digits, time.monotonic()
            number * number
            digits *= 2 if time.monotonic() - began < seconds / 3 else 1


endpoint, how, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
model = build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
agent = koopmon.attach(model, optimizer, endpoint=endpoint, run="held")
losses = [train_step(model, optimizer, step) for step in range(5)]
sys.stdin.readline()
hold(how, seconds)
losses += [train_step(model, optimizer, step) for step in range(5, 30)]
assert agent.enabled, agent.status()["reason"]
agent.close()
print(*[loss.hex() for loss in losses])
