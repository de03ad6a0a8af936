"""Small third-party and hand-written models for the tests that every adapter must pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the import of these libraries raises them, not our calls
    warnings.simplefilter("ignore", FutureWarning)
    transformers = pytest.importorskip("transformers")
    x_transformers = pytest.importorskip("x_transformers")

B, T, D, V, L = 2, 9, 32, 50, 3
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Given = tuple[Case, str | None, tuple[int, ...]]


def tokens() -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))


def padding() -> Tensor:
    """Mask that is True at padding: the last four tokens of the second sequence."""
    return torch.arange(T) >= torch.tensor([[T], [T - 4]])


HF_SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": L,
    "num_attention_heads": 2,
}
HF_ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Case:
    config = transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=2, n_positions=16, **HF_ENDS)
    return transformers.GPT2LMHeadModel(config), (tokens(),), {"labels": tokens()}


def llama() -> Case:
    config = transformers.LlamaConfig(**HF_SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), (tokens(),), {"labels": tokens()}


def qwen3() -> Case:
    config = transformers.Qwen3Config(**HF_SIZES, num_key_value_heads=2, head_dim=16)
    return transformers.Qwen3ForCausalLM(config), (tokens(),), {"labels": tokens()}


def bert() -> Case:
    model = transformers.BertModel(transformers.BertConfig(**HF_SIZES))
    return model, (tokens(), (~padding()).long()), {}


def vit() -> Case:
    sizes = {name: size for name, size in HF_SIZES.items() if name != "vocab_size"}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=2))
    return model, (torch.randn(B, 3, 8, 8),), {}


def gpt_neox() -> Case:
    config = transformers.GPTNeoXConfig(**HF_SIZES, use_parallel_residual=True, **HF_ENDS)
    return transformers.GPTNeoXForCausalLM(config), (tokens(),), {"labels": tokens()}


def t5_config() -> Any:
    return transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=16, d_ff=48, num_layers=L, num_heads=2, decoder_start_token_id=0
    )


def t5_encoder() -> Case:
    return transformers.T5EncoderModel(t5_config()), (tokens(),), {}


def t5() -> Case:
    labels = tokens()[:, :7].contiguous()
    return transformers.T5ForConditionalGeneration(t5_config()), (), {"input_ids": tokens(), "labels": labels}


def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(D, 2, 48, batch_first=True)
    return nn.TransformerEncoder(layer, L), (torch.randn(B, T, D),), {"src_key_padding_mask": padding()}


def torch_encoder_tokens_first() -> Case:
    layer = nn.TransformerEncoderLayer(D, 2, 48, batch_first=False, norm_first=True)
    model = nn.TransformerEncoder(layer, L, enable_nested_tensor=False)
    return model, (torch.randn(T, B, D),), {"src_key_padding_mask": padding()}


def torch_encoder_decoder() -> Case:
    model = nn.Transformer(D, 2, L - 1, L, 48, batch_first=True)
    return model, (torch.randn(B, T, D), torch.randn(B, 7, D)), {}


def x_decoder(**settings: Any) -> Case:
    layers = x_transformers.Decoder(dim=D, depth=L, heads=2, **settings)
    return x_transformers.TransformerWrapper(num_tokens=V, max_seq_len=16, attn_layers=layers), (tokens(),), {}


def x_post_norm() -> Case:
    model, args, _ = x_decoder(pre_norm=False)
    return model, args, {"mask": ~padding()}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """nanoGPT's block with three normalisations and four ways of passing the state."""

    def __init__(self, norm: str = "pre", manner: str = "tensor") -> None:
        super().__init__()
        self.norm, self.manner = norm, manner
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.norms = nn.ModuleList(nn.Identity() if norm == "none" else nn.LayerNorm(D) for _ in range(2))

    def forward(self, x: Tensor, cache: None = None) -> Any:
        for norm, f in zip(self.norms, (self.attn, self.mlp), strict=True):
            if self.norm == "post":
                x = norm(x + f(x))
            elif self.manner == "in place":
                x += f(norm(x))
            else:
                x = x + f(norm(x))
        return {"tuple": (x, cache), "list": [x, cache]}.get(self.manner, x)


class WrittenOut(nn.Module):
    """Block of another class with its own attention code."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out, self.up, self.down = (nn.Linear(D, D) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return x + self.down(self.up(x).relu())


class NanoGPT(nn.Module):
    def __init__(self, blocks: list[nn.Module], holder: str = "list", by_name: bool = False) -> None:
        super().__init__()
        self.by_name = by_name
        self.wte = nn.Embedding(V, D)
        if holder == "dict of list":
            self.transformer = nn.ModuleDict({"drop": nn.Dropout(0.1), "h": nn.ModuleList(blocks)})
        elif holder == "dict":
            self.transformer = nn.ModuleDict({f"block{index}": block for index, block in enumerate(blocks)})
        elif holder == "attributes":
            for index, block in enumerate(blocks):
                self.add_module(f"h{index}", block)
        else:
            self.transformer = nn.Sequential(*blocks) if holder == "sequential" else nn.ModuleList(blocks)
        self.holder = holder
        self.ln_f = nn.LayerNorm(D)

    def forward(self, idx: Tensor) -> Tensor:
        h = self.wte(idx)
        if self.holder == "sequential":
            return self.ln_f(self.transformer(h))
        if self.holder == "attributes":
            blocks = [getattr(self, f"h{index}") for index in range(L)]
        elif self.holder == "dict":
            blocks = list(self.transformer.values())
        else:
            blocks = self.transformer["h"] if self.holder == "dict of list" else self.transformer
        for block in blocks:
            out = block(x=h) if self.by_name else block(h)
            h = out[0] if isinstance(out, (tuple, list)) else out
        return self.ln_f(h)


def nano(holder: str = "list", by_name: bool = False, **block: Any) -> Case:
    return NanoGPT([Block(**block) for _ in range(L)], holder, by_name), (tokens(),), {}


def mixed_classes() -> Case:
    return NanoGPT([Block(), WrittenOut(), Block(norm="post")]), (tokens(),), {}


def one_sequential() -> Case:
    """Embedding, blocks and head in one list: only the blocks are the stack."""
    return (
        nn.Sequential(nn.Embedding(V, D), *[Block() for _ in range(L)], nn.LayerNorm(D), nn.Linear(D, V)),
        (tokens(),),
        {},
    )


def two_runs() -> Case:
    """A block, a single layer, and a longer run of blocks in one list: the run is the stack."""
    blocks = [Block() for _ in range(L + 1)]
    return nn.Sequential(nn.Embedding(V, D), blocks[0], nn.LayerNorm(D), *blocks[1:]), (tokens(),), {}


CASES: dict[str, tuple[Callable[[], Case], str | None, tuple[int, ...]]] = {
    # name: (factory, name of the stack, shape of its state)
    "gpt2": (gpt2, "transformer.h", (B, T, D)),
    "llama": (llama, "model.layers", (B, T, D)),
    "qwen3": (qwen3, "model.layers", (B, T, D)),
    "bert": (bert, "encoder.layer", (B, T, D)),
    "vit": (vit, None, (B, 17, D)),
    "gpt_neox": (gpt_neox, "gpt_neox.layers", (B, T, D)),
    "t5_encoder": (t5_encoder, "encoder.block", (B, T, D)),
    "t5": (t5, "decoder.block", (B, 7, D)),
    "torch_encoder": (torch_encoder, "layers", (B, T, D)),
    "torch_encoder_tokens_first": (torch_encoder_tokens_first, "layers", (T, B, D)),
    "torch_encoder_decoder": (torch_encoder_decoder, "decoder.layers", (B, 7, D)),
    "x_transformers": (x_decoder, "attn_layers.layers", (B, T, D)),
    "x_transformers_gated": (lambda: x_decoder(gate_residual=True), "attn_layers.layers", (B, T, D)),
    "x_transformers_post": (x_post_norm, "attn_layers.layers", (B, T, D)),
    "nano_pre": (nano, "transformer", (B, T, D)),
    "nano_post": (lambda: nano(norm="post"), "transformer", (B, T, D)),
    "nano_none": (lambda: nano(norm="none"), "transformer", (B, T, D)),
    "nano_sequential": (lambda: nano("sequential"), "transformer", (B, T, D)),
    "nano_dict_of_list": (lambda: nano("dict of list"), "transformer.h", (B, T, D)),
    "nano_dict": (lambda: nano("dict"), "transformer", (B, T, D)),
    "nano_attributes": (lambda: nano("attributes"), "h*", (B, T, D)),
    "nano_by_name": (lambda: nano(by_name=True), "transformer", (B, T, D)),
    "nano_tuple": (lambda: nano(manner="tuple"), "transformer", (B, T, D)),
    "nano_list": (lambda: nano(manner="list"), "transformer", (B, T, D)),
    "nano_in_place": (lambda: nano(manner="in place"), "transformer", (B, T, D)),
    "mixed_classes": (mixed_classes, "transformer", (B, T, D)),
    "one_sequential": (one_sequential, "", (B, T, D)),
    "two_runs": (two_runs, "[3:6]", (B, T, D)),
}
