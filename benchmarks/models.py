"""Small models and tasks of the project, for benchmarks, tables and tests (docs/method.md).

Shapes: B batch, T tokens, D width, V vocabulary. Private generators draw all numbers: equal seeds give equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["pre", "post", "none", "rms", "sub", "deep", "rezero"]
NORMS: tuple[Norm, ...] = get_args(Norm)
Initialisation = Literal["gpt2", "torch"]
INITIAL_STD = 0.02
"""Standard deviation of GPT-2's initialisation. PyTorch's own initialisation gives other spectra."""


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D); `sub` normalises before the output projection."""

    def __init__(self, width: int, num_heads: int, *, sub: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width) if sub else nn.Identity()
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        projected: Tensor = self.project(self.norm(mixed))
        return projected


class FeedForward(nn.Module):
    """Two layers with a GELU between them, (..., D) to (..., D); `sub` normalises before the second."""

    def __init__(self, width: int, *, sub: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width) if sub else nn.Identity()
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.project(self.norm(functional.gelu(self.expand(x))))
        return projected


class Residual(nn.Module):
    """One sublayer f on the residual stream, by `norm`.

    pre, rms: x + f(norm(x)). sub: the same, with f normalised within. post: norm(x + f(x)). none: x + f(x).
    deep: alpha x + f(x) with alpha = (2L)^(1/4), the scaled residual without its norm that the published row fits.
    rezero: x + a f(x) with a = 0 at the start.
    """

    def __init__(self, sublayer: nn.Module, norm: Norm, width: int, num_layers: int) -> None:
        super().__init__()
        self.sublayer = sublayer
        makes_norm = {"pre": nn.LayerNorm, "sub": nn.LayerNorm, "rms": nn.RMSNorm, "post": nn.LayerNorm}.get(norm)
        self.norm = makes_norm(width) if makes_norm else nn.Identity()
        self.is_post = norm == "post"
        self.carry = (2 * num_layers) ** 0.25 if norm == "deep" else 1.0
        self.gate = nn.Parameter(torch.zeros(())) if norm == "rezero" else None

    def forward(self, x: Tensor) -> Tensor:
        update = self.sublayer(x if self.is_post else self.norm(x))
        if self.gate is not None:
            update = self.gate * update
        y: Tensor = self.carry * x + update
        return self.norm(y) if self.is_post else y


class Block(nn.Module):
    """Attention, then feed-forward: h_l to h_{l+1}, (B, T, D)."""

    def __init__(self, norm: Norm, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        sub = norm == "sub"
        self.attention = Residual(Attention(width, num_heads, sub=sub), norm, width, num_layers)
        self.feed_forward = Residual(FeedForward(width, sub=sub), norm, width, num_layers)

    def forward(self, h: Tensor) -> Tensor:
        updated: Tensor = self.feed_forward(self.attention(h))
        return updated


class Decoder(nn.Module):
    """Decoder-only transformer, tokens (B, T) to logits (B, T, V).

    `initialisation` "gpt2" has std 0.02 and biases 0; "torch" keeps the initialisation of the modules. Blocks from
    `make_block` keep their own initialisation.
    """

    def __init__(
        self,
        norm: Norm,
        *,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        max_tokens: int = 64,
        vocabulary: int = 256,
        seed: int = 0,
        initialisation: Initialisation = "gpt2",
        make_block: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm = {norm!r}: allowed are {', '.join(NORMS)}")
        make = make_block or (lambda: Block(norm, width, num_heads, num_layers))
        final_norms = {"pre": nn.LayerNorm, "sub": nn.LayerNorm, "rms": nn.RMSNorm}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token = nn.Embedding(vocabulary, width)
            self.position = nn.Embedding(max_tokens, width)
            self.blocks = nn.ModuleList(make() for _ in range(num_layers))
            self.final_norm = final_norms[norm](width) if norm in final_norms else nn.Identity()
            self.head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, part in self.named_children():
            if initialisation == "gpt2" and (name != "blocks" or make_block is None):
                initialise(part, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.final_norm(h))
        return logits


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Apply GPT-2's initialisation to every linear map and embedding in `model`."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INITIAL_STD, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def associative_recall(
    batch_size: int, *, seed: int, num_tokens: int = 64, num_pairs: int = 4, vocabulary: int = 256
) -> tuple[Tensor, Tensor]:
    """Draw a batch of D.1: tokens (B, T) as [k1, v1, ..., kn, vn, padding..., q] and the label (B,), the value of q's
    key.

    Padding is token 0. The keys of one sequence are distinct, so the label is unambiguous.
    """
    if num_tokens < 2 * num_pairs + 1:
        raise ValueError(f"num_tokens = {num_tokens}: {num_pairs} pairs and a query need at least {2 * num_pairs + 1}")
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(batch_size, vocabulary - 1, generator=generator).argsort(dim=1)[:, :num_pairs] + 1
    values = torch.randint(1, vocabulary, (batch_size, num_pairs), generator=generator)
    asked = torch.randint(num_pairs, (batch_size, 1), generator=generator)
    tokens = torch.zeros(batch_size, num_tokens, dtype=torch.int64)
    tokens[:, 0 : 2 * num_pairs : 2] = keys
    tokens[:, 1 : 2 * num_pairs : 2] = values
    tokens[:, -1:] = keys.gather(1, asked)
    return tokens, values.gather(1, asked).squeeze(1)


def associative_recall_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy at the last position: logits (B, T, V), labels (B,)."""
    return functional.cross_entropy(logits[:, -1], labels)


def synthetic_text(batch_size: int, *, seed: int, num_tokens: int = 256, vocabulary: int = 10_000) -> Tensor:
    """Draw a batch of D.2, tokens (B, T): repetitions, runs of consecutive ids and random tokens, with ids from 10 on.

    Segments are drawn with equal probability until the sequence is full: a pattern of 2-5 tokens repeated 2-4 times,
    5-15 consecutive ids, or 5-15 random ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def segment() -> Tensor:
        kind = draw(0, 2)
        if kind == 0:
            pattern = torch.randint(10, vocabulary, (draw(2, 5),), generator=generator)
            return pattern.repeat(draw(2, 4))
        length = draw(5, 15)
        if kind == 1:
            first = draw(10, vocabulary - length)
            return torch.arange(first, first + length)
        return torch.randint(10, vocabulary, (length,), generator=generator)

    rows = []
    for _ in range(batch_size):
        segments: list[Tensor] = []
        while sum(map(len, segments)) < num_tokens:
            segments.append(segment())
        rows.append(torch.cat(segments)[:num_tokens])
    return torch.stack(rows)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the cross-entropy of each token given the earlier ones: logits (B, T, V), tokens (B, T)."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
