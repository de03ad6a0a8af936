"""Tasks of the small trainings: batches, losses and scores by name (docs/method.md).

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from benchmarks.models import associative_recall, associative_recall_loss, next_token_loss, synthetic_text

Task = Literal["recall-4", "recall-2", "text", "text-full"]
TASKS: Mapping[Task, Mapping[str, int]] = {
    "recall-4": {
        "num_tokens": 64,
        "num_pairs": 4,
        "vocabulary": 256,
    },  # the paper's task, which small models hardly learn
    "recall-2": {"num_tokens": 16, "num_pairs": 2, "vocabulary": 32},  # a task that small models learn
    "text": {"num_tokens": 64, "vocabulary": 1000},  # the paper's synthetic text, made small
    "text-full": {"num_tokens": 256, "vocabulary": 10_000},
}


def draw(task: Task, num_sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens (B, T) and labels: (B,) for recall, the tokens themselves for text."""
    if _is_recall(task):
        return associative_recall(num_sequences, seed=seed, **TASKS[task])
    tokens = synthetic_text(num_sequences, seed=seed, **TASKS[task])
    return tokens, tokens


def loss_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of the answer, or of every next token, from logits (B, T, V)."""
    return associative_recall_loss(logits, labels) if _is_recall(task) else next_token_loss(logits, labels)


@torch.no_grad()
def share_right(task: Task, logits: Tensor, labels: Tensor) -> float:
    """Count the answers, or next tokens, with the largest logit."""
    if _is_recall(task):
        return logits[:, -1].argmax(-1).eq(labels).float().mean().item()
    return logits[:, :-1].argmax(-1).eq(labels[:, 1:]).float().mean().item()


def _is_recall(task: Task) -> bool:
    return "num_pairs" in TASKS[task]
