"""Small models of experts, state spaces and splines, from third-party libraries where available.

B batch, T tokens, D width, V vocabulary, L blocks, E experts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.zoo import HF_SIZES, B, Case, D, T, V, nano, tokens, transformers, x_decoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the import of these libraries raises them, not our calls
    warnings.simplefilter("ignore", SyntaxWarning)
    mambapy_mamba = pytest.importorskip("mambapy.mamba")
    pykan = pytest.importorskip("kan")
    kan_layer = pytest.importorskip("kan.KANLayer")

logging.getLogger("transformers").setLevel(logging.ERROR)  # each state space warns about its missing kernels

L, E = 4, 4
HF = {**HF_SIZES, "num_hidden_layers": L}
ATTENTION = {**HF, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def _language_model(make: Any, config: Any) -> Case:
    return make(config), (tokens(),), {"labels": tokens()}


def mixtral(**options: Any) -> Case:
    sizes = {**ATTENTION, "num_local_experts": E, "num_experts_per_tok": 2, **options}
    return _language_model(transformers.MixtralForCausalLM, transformers.MixtralConfig(**sizes))


def qwen3_moe() -> Case:
    config = transformers.Qwen3MoeConfig(
        **ATTENTION, head_dim=16, num_experts=E, num_experts_per_tok=2, moe_intermediate_size=24
    )
    return _language_model(transformers.Qwen3MoeForCausalLM, config)


def olmoe() -> Case:
    config = transformers.OlmoeConfig(**ATTENTION, num_experts=E, num_experts_per_tok=2, **ENDS)
    model, args, kwargs = _language_model(transformers.OlmoeForCausalLM, config)
    return model, args, kwargs


def deepseek_v3() -> Case:
    """Mixture with a dense first layer and sigmoid router scores."""
    config = transformers.DeepseekV3Config(
        **ATTENTION,
        n_routed_experts=E,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return _language_model(transformers.DeepseekV3ForCausalLM, config)


def switch_encoder() -> Case:
    """Mixture with one expert per token, a capacity that drops tokens above it, and experts in a dictionary."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=V,
        d_model=D,
        d_kv=16,
        d_ff=48,
        num_layers=L,
        num_sparse_encoder_layers=2,
        num_heads=2,
        num_experts=E,
        expert_capacity=2,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    return transformers.SwitchTransformersEncoderModel(config), (tokens(),), {}


def jamba() -> Case:
    """Alternating state spaces and attention, with experts in every second block."""
    config = transformers.JambaConfig(
        **ATTENTION,
        num_experts=E,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )
    return _language_model(transformers.JambaForCausalLM, config)


STATE_SPACE = {"vocab_size": V, "hidden_size": D, "state_size": 4, "num_hidden_layers": L, **ENDS}


def mamba() -> Case:
    return _language_model(transformers.MambaForCausalLM, transformers.MambaConfig(**STATE_SPACE, time_step_rank=4))


def falcon_mamba() -> Case:
    config = transformers.FalconMambaConfig(**STATE_SPACE, time_step_rank=4)
    return _language_model(transformers.FalconMambaForCausalLM, config)


def mamba2() -> Case:
    config = transformers.Mamba2Config(**STATE_SPACE, num_heads=8, head_dim=8, n_groups=1, chunk_size=4)
    return _language_model(transformers.Mamba2ForCausalLM, config)


def mambapy() -> Case:
    config = mambapy_mamba.MambaConfig(d_model=D, n_layers=L, d_state=4)
    return mambapy_mamba.Mamba(config), (torch.randn(B, T, D),), {}


class Experts(nn.Module):
    """Hand-written mixture: a linear router, the best two of E experts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D)) for _ in range(E))

    def forward(self, h: Tensor) -> Tensor:
        weights, chosen = self.gate(h).softmax(-1).topk(self.top_k)
        kept = torch.zeros_like(self.gate(h)).scatter(-1, chosen, weights)
        return sum((kept[..., i, None] * expert(h) for i, expert in enumerate(self.experts)), torch.zeros_like(h))


class Splines(nn.Module):
    """pykan's layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = kan_layer.KANLayer(D, D, num=3, k=3)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h.flatten(0, -2))[0].view_as(h)


def transformer_with(make: Callable[[], nn.Module]) -> Case:
    """Build a small transformer with `make()` for the feed-forward part of every block."""
    model, args, kwargs = nano()
    blocks = model.transformer
    while len(blocks) < L:
        blocks.append(nano()[0].transformer[0])
    for block in blocks:
        block.mlp = make()
    return model, args, kwargs


def own_experts() -> Case:
    return transformer_with(Experts)


def kan_transformer() -> Case:
    return transformer_with(Splines)


def own_kan(width: tuple[int, ...] = (8,) * (L + 1)) -> Case:
    model = pykan.KAN(width=list(width), grid=3, k=3, symbolic_enabled=False, auto_save=False)
    return model, (torch.randn(32, width[0]),), {}


def dense() -> Case:
    return x_decoder()


CASES: dict[str, tuple[Callable[[], Case], str, str, tuple[int, ...], frozenset[str]]] = {
    # name: (factory, adapter, name of the stack, shape of its state, flags)
    "mixtral": (mixtral, "moe", "model.layers", (B, T, D), frozenset()),
    "qwen3_moe": (qwen3_moe, "moe", "model.layers", (B, T, D), frozenset()),
    "olmoe": (olmoe, "moe", "model.layers", (B, T, D), frozenset()),
    "deepseek_v3": (deepseek_v3, "moe", "model.layers", (B, T, D), frozenset({"dense-layers"})),
    "switch_encoder": (switch_encoder, "moe", "encoder.block", (B, T, D), frozenset({"dense-layers"})),
    "own_experts": (own_experts, "moe", "transformer", (B, T, D), frozenset()),
    "jamba": (jamba, "mamba", "model.layers", (B, T, D), frozenset({"hybrid", "moe"})),
    "mamba": (mamba, "mamba", "backbone.layers", (B, T, D), frozenset()),
    "mamba2": (mamba2, "mamba", "backbone.layers", (B, T, D), frozenset()),
    "falcon_mamba": (falcon_mamba, "mamba", "backbone.layers", (B, T, D), frozenset()),
    "mambapy": (mambapy, "mamba", "layers", (B, T, D), frozenset()),
    "kan_transformer": (kan_transformer, "kan", "transformer", (B, T, D), frozenset()),
    "own_kan": (own_kan, "kan", "act_fun", (32, 8), frozenset({"plain-chain"})),
}
