"""Language model with a fading echo of earlier tokens: an example of a custom architecture."""

import torch
from torch import Tensor, nn


class EchoBlock(nn.Module):
    """h + f(h), twice; one norm serves both. Returns (echo, state), each of shape (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fading = nn.Parameter(torch.linspace(-2.0, 2.0, width))
        self.mix = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.sigmoid(self.fading)
        heard = [torch.zeros_like(x[:, 0])]
        for token in self.norm(x).unbind(1):
            heard.append(kept * heard[-1] + (1.0 - kept) * token)
        echo = self.mix(torch.stack(heard[1:], 1))
        x = x + echo
        return echo, x + self.down(torch.tanh(self.up(self.norm(x))))


class Echo(nn.Module):
    """Tokens (B, T) to logits (B, T, vocabulary); `padding` (B, T) is True where there is no token."""

    def __init__(self, vocabulary: int = 30, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(EchoBlock(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            _, x = block(x)
        return self.head(x)
