"""Real text on every machine: the source of Python's standard library, as bytes."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

TRAINING_SHARE = 0.95
"""Share for training; the rest, at the end, is for validation."""


@functools.cache
def library_source() -> Tensor:
    """Read the standard library except its tests, in the order of the paths; uint8, (about 12.7e6,)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = [
        path.read_bytes()
        for path in sorted(root.rglob("*.py"))
        if not {"test", "tests", "site-packages", "idle_test"} & set(path.relative_to(root).parts)
    ]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def batch(generator: torch.Generator, num_sequences: int, num_tokens: int, *, validation: bool = False) -> Tensor:
    """Draw random excerpts, (B, T + 1), int64: the inputs are all but the last token, the labels all but the first."""
    text = library_source()
    border = int(len(text) * TRAINING_SHARE)
    low, high = (border, len(text)) if validation else (0, border)
    starts = torch.randint(low, high - num_tokens - 1, (num_sequences, 1), generator=generator)
    return text[starts + torch.arange(num_tokens + 1)].long()
