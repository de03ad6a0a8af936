"""Common decoders: Pre-LN with LayerNorm as in GPT-2, and RMSNorm with SwiGLU and rotary positions as in Llama.

The other families are the models of `benchmarks.models` and `benchmarks.families`, with the usual normalisation.

Shapes: B sequences, T tokens, D width, V vocabulary, H heads.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.families import language_model
from benchmarks.models import Decoder

Norm = Literal["pre", "rms"]
NORMS: tuple[Norm, ...] = get_args(Norm)
Family = Literal["pre", "rms", "post", "moe", "mamba", "kan"]
"""Families of the proving ground.

pre, rms: `LanguageModel`. post: Post-LN. moe: two of eight experts for each token. mamba: selective state spaces. kan:
splines in place of the feed-forward part. The last three are Pre-LN or, for state spaces, RMSNorm.
"""
FAMILIES: tuple[Family, ...] = get_args(Family)
NUM_HEADS = 4
VOCABULARY = 256
INITIAL_STD = 0.02
"""Standard deviation of GPT-2's initialisation; layers that write into the stream divide it by sqrt(2 L)."""
ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D).

    With `record` set, the next forward stores the largest causal attention logit in `max_logit`, (H,). `dtype` is that
    of the attention alone.
    """

    def __init__(self, width: int, *, rotary: bool, qk_norm: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        head_width = width // NUM_HEADS
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.q_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()
        self.rotary = rotary
        self.dtype = dtype
        self.record = False
        self.max_logit: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if self.record:
            self.max_logit = largest_logit(q.detach(), k.detach())
        q, k, v = (part.to(self.dtype) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        written: Tensor = self.project(mixed.to(x.dtype))
        return written


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to x (B, H, T, D/H): pairs of channels rotate by an angle proportional to the position."""
    num_tokens, half = x.shape[-2], x.shape[-1] // 2
    rates = ROTARY_BASE ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.outer(torch.arange(num_tokens, dtype=x.dtype), rates)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """Compute the largest causal logit per head; q and k are (B, H, T, D/H), the result is (H,)."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~causal, -math.inf).amax(dim=(0, 2, 3))


class GeluFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.project(functional.gelu(self.expand(x)))
        return written


class GatedFeedForward(nn.Module):
    """SwiGLU with a hidden width of 8/3 D, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.gate = nn.Linear(width, hidden, bias=False)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.project = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.project(functional.silu(self.gate(x)) * self.expand(x))
        return written


class Block(nn.Module):
    def __init__(self, norm: Norm, width: int, *, qk_norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        make_norm = nn.LayerNorm if norm == "pre" else nn.RMSNorm
        self.attention_norm = make_norm(width)
        self.attention = Attention(width, rotary=norm == "rms", qk_norm=qk_norm, dtype=dtype)
        self.mlp_norm = make_norm(width)
        self.mlp = GeluFeedForward(width) if norm == "pre" else GatedFeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class LanguageModel(nn.Module):
    """Byte-level decoder: tokens (B, T) to logits (B, T, V). It draws its weights from the global generator.

    `dtype` is that of the attention alone.
    """

    def __init__(
        self,
        norm: Norm,
        *,
        width: int,
        num_layers: int,
        max_tokens: int,
        qk_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(max_tokens, width) if norm == "pre" else None
        self.blocks = nn.ModuleList(Block(norm, width, qk_norm=qk_norm, dtype=dtype) for _ in range(num_layers))
        self.final_norm = (nn.LayerNorm if norm == "pre" else nn.RMSNorm)(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                writes = name.endswith("project.weight")
                nn.init.normal_(weight, std=INITIAL_STD / (math.sqrt(2 * num_layers) if writes else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens)
        if self.position is not None:
            h = h + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.final_norm(h))
        return logits


def build(
    family: Family,
    *,
    width: int,
    num_layers: int,
    max_tokens: int,
    seed: int,
    qk_norm: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel | Decoder:
    """Build a model of `family`. QK-norm and the type of the attention apply to the first two families only."""
    if family == "pre" or family == "rms":
        torch.manual_seed(seed)
        return LanguageModel(
            family, width=width, num_layers=num_layers, max_tokens=max_tokens, qk_norm=qk_norm, dtype=dtype
        )
    if family == "post":
        return Decoder("post", width=width, num_layers=num_layers, max_tokens=max_tokens, seed=seed)
    return language_model(
        "moe-2" if family == "moe" else family,
        width=width,
        num_layers=num_layers,
        vocabulary=VOCABULARY,
        num_tokens=max_tokens,
        seed=seed,
    )


def attentions(model: nn.Module) -> list[Attention]:
    """Return the attentions of a model that can record their logits."""
    return [module for module in model.modules() if isinstance(module, Attention)]
