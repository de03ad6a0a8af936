"""What the small trainings learn: batches, losses and scores by the task's name (docs/method.md).

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
    "recall-4": {"num_tokens": 64, "num_pairs": 4, "vocabulary": 256},  # the paper's; small models hardly learn it
    "recall-2": {"num_tokens": 16, "num_pairs": 2, "vocabulary": 32},  # small models do learn it
    "text": {"num_tokens": 64, "vocabulary": 1000},  # the paper's synthetic text, made small
    "text-full": {"num_tokens": 256, "vocabulary": 10_000},
}


def draw(task: Task, num_sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and labels: (B,) of recall, the tokens themselves of text."""
    if _is_recall(task):
        return associative_recall(num_sequences, seed=seed, **TASKS[task])
    tokens = synthetic_text(num_sequences, seed=seed, **TASKS[task])
    return tokens, tokens


def loss_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the answer, or of every next token, from logits (B, T, V)."""
    return associative_recall_loss(logits, labels) if _is_recall(task) else next_token_loss(logits, labels)


@torch.no_grad()
def share_right(task: Task, logits: Tensor, labels: Tensor) -> float:
    """How many answers, or next tokens, have the largest logit."""
    if _is_recall(task):
        return logits[:, -1].argmax(-1).eq(labels).float().mean().item()
    return logits[:, :-1].argmax(-1).eq(labels[:, 1:]).float().mean().item()


def _is_recall(task: Task) -> bool:
    return "num_pairs" in TASKS[task]
