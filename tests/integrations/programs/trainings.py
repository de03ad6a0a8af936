"""Training of the programs beside this file: a small byte model without normalisation, and its results."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.scripts.train_prose import ProseModel, read_bytes

torch.set_num_threads(1)
CONTEXT = 64
BATCH = 4
WARMUP = 20
LAST = 15
DEADLY_RATE = 0.016
"""Learning rate at which the model below diverges within 25 to 60 steps."""
PACE_SECONDS = 0.03
"""Delay of each step, so that a monitor on a busy machine is few steps behind."""


class Prose(Dataset[dict[str, Tensor]]):
    """Draw pieces of text from random places, equal for one seed."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self._text = read_bytes()
        generator = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(0, len(self._text) - CONTEXT - 1, (size,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._starts[index]
        return {"ids": self._text[start : start + CONTEXT + 1]}


class ByteModel(ProseModel):
    """Map bytes (B, T+1) to {"loss": nats per byte}."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(dim=64, depth=4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        logits = super().forward(ids[:, :-1])
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())}


def digest(model: torch.nn.Module) -> str:
    """Compute a checksum of all parameters in all bits."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def told(agent: Any) -> dict[str, Any]:
    """Return the status of an agent."""
    return {key: agent.status()[key] for key in ("enabled", "connected", "sent", "layout", "acts", "errors", "reason")}


def connected(agent: Any) -> None:
    """Wait until the monitor replies, so that it watches the whole training."""
    deadline = time.monotonic() + 60.0
    while not agent.status()["connected"]:
        assert time.monotonic() < deadline, agent.status()
        time.sleep(0.01)


def write(results: list[dict[str, Any]]) -> None:
    """Write the results to OUT.RANK for the test."""
    Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}").write_text(json.dumps(results))
