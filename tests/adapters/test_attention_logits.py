"""The largest attention logit against one that is computed from queries and keys, in models of several libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.proving_ground.models import Attention
from koopmon.observables import declared
from koopmon.plugins import select
from koopmon_adapters.transformer import largest_logit

B, H, T, D = 2, 4, 24, 8


def expected(q: Tensor, k: Tensor, scale: float, *, causal: bool) -> float:
    logits = q @ k.transpose(-1, -2) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
    return logits.logsumexp(-1).max().item()


def read(output: Any) -> float:
    found = largest_logit(nn.Identity(), (), {}, output)
    assert found is not None
    assert found.dim() == 0
    return found.item()


def queries_and_keys(groups: int = 1, factor: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, T, D), (B, H // groups, T, D), (B, H // groups, T, D))
    q, k, v = (factor * torch.randn(shape, requires_grad=True) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("factor", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "formed"])
def test_fused_and_formed_attention_give_one_number(factor: float, causal: bool, dropout: float) -> None:
    q, k, v = queries_and_keys(factor=factor)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    written = nn.Linear(H * D, 5)(mixed.transpose(1, 2).flatten(-2))
    assert read(written) == pytest.approx(expected(q, k, 1 / math.sqrt(D), causal=causal), rel=1e-5, abs=1e-4)


def test_grouped_queries() -> None:
    q, k, v = queries_and_keys(groups=2)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    repeated = k.repeat_interleave(2, dim=1)
    assert read(mixed) == pytest.approx(expected(q, repeated, 1 / math.sqrt(D), causal=True), rel=1e-5)


@pytest.mark.parametrize("scale", ["multiplied", "divided", "before"])
def test_attention_that_is_written_out(scale: str) -> None:
    q, k, v = queries_and_keys()
    root = math.sqrt(D)
    logits = {
        "multiplied": lambda: q @ k.transpose(-1, -2) * (1 / root),
        "divided": lambda: q @ k.transpose(-1, -2) / root,
        "before": lambda: (q / root) @ k.transpose(-1, -2),
    }[scale]()
    mask = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), torch.finfo(torch.float32).min)
    shares = functional.softmax(logits + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    output = (functional.dropout(shares, 0.1) @ v).transpose(1, 2).reshape(B, T, -1), shares
    assert read(output) == pytest.approx(expected(q, k, 1 / root, causal=True), rel=1e-5)


def test_the_mask_hides_a_large_logit() -> None:
    q, k, v = (torch.zeros(1, 1, 4, 2, requires_grad=True) for _ in range(3))
    q, k = q + 1.0, k + torch.tensor([0.0, 0.0, 0.0, 1000.0]).reshape(1, 1, 4, 1)
    hidden = torch.tensor([True, True, True, False]).expand(4, 4)
    assert read(functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden)) == pytest.approx(math.log(3))
    assert read(functional.scaled_dot_product_attention(q, k, v)) == pytest.approx(2000 / math.sqrt(2))


def _without_gradients(attend: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    with torch.no_grad():
        return attend(q)


def _checkpointed(attend: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    calls = []

    def once(q: Tensor) -> Tensor:
        calls.append(1)
        mixed = attend(q)
        assert largest_logit(nn.Identity(), (), {}, mixed) is None
        assert len(calls) == 1, "the reading has recomputed the forward"
        return mixed

    output: Tensor = checkpoint(once, q, use_reentrant=False)
    return output


@pytest.mark.parametrize(
    "run", [_without_gradients, _checkpointed, lambda attend, q: q.tanh()], ids=["no-grad", "checkpoint", "none"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_without_a_graph_of_attention_there_is_no_value(run: Any, dropout: float) -> None:
    q, k, v = queries_and_keys()

    def attend(q: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    assert largest_logit(nn.Identity(), (), {}, run(attend, q)) is None


def test_reading_leaves_the_gradients_alone() -> None:
    q, k, v = queries_and_keys()
    gradients = []
    for reads in (False, True):
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if reads:
            read(mixed)
        gradients.append(torch.autograd.grad(mixed.square().sum(), (q, k, v), retain_graph=True))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# Models. The reading is on the modules that the adapter names.


def readings(model: nn.Module, *args: Any, **kwargs: Any) -> dict[int, float]:
    """Return the largest logit by layer of one forward in training mode."""
    selection = select(model)
    stack = selection.candidates[0]
    found: dict[int, float] = {}
    handles = []
    for each in declared(selection.families, stack):
        if each.name != "max_attention_logit":
            continue

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = each.layer) -> None:
            value = largest_logit(module, args, kwargs, output)
            if value is not None:
                found[layer] = max(value.item(), found.get(layer, -math.inf))

        handles.append(each.module.register_forward_hook(note, with_kwargs=True))
    model.train()
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


class Recorded:
    """Records queries and keys of every fused attention while it is in force."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest: list[float] = []
        real = functional.scaled_dot_product_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *rest: Any, **named: Any) -> Tensor:
            scale = named.get("scale") or 1 / math.sqrt(q.shape[-1])
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            assert attn_mask is None
            self.largest.append(expected(q, keys, scale, causal=named.get("is_causal", False)))
            return real(q, k, v, attn_mask, *rest, **named)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)


def transformers_model(name: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, use_cache=False, **changes)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)  # logits that differ
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    recorded = Recorded(monkeypatch)
    fused = readings(transformers_model(name, attn_implementation="sdpa", **quiet), input_ids=tokens)
    assert list(fused.values()) == pytest.approx(recorded.largest, rel=1e-4)
    formed = readings(transformers_model(name, attn_implementation="eager", **quiet), input_ids=tokens)
    assert formed == pytest.approx(fused, rel=1e-4)
    assert sorted(fused) == [0, 1, 2]


@pytest.mark.skipif(find_spec("timm") is None, reason="timm, which needs torchvision, is in no extra")
def test_a_model_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_module("timm")
    recorded = Recorded(monkeypatch)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, patch_size=8)
    found = readings(model, torch.randn(2, 3, 32, 32))
    assert list(found.values()) == pytest.approx(recorded.largest, rel=1e-4)
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_torch_encoder_and_attention_with_weights(dropout: float) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=dropout)
    found = readings(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 8, 16))
    assert sorted(found) == [0, 1, 2]
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 8, 16)
    fused, formed = attention(x, x, x, need_weights=False), attention(x, x, x, need_weights=True)
    assert read(formed) == pytest.approx(read(fused), rel=1e-5)


@pytest.mark.parametrize("rotary", [True, False])
def test_it_exceeds_the_largest_logit_by_log_keys_at_most(rotary: bool) -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, rotary=rotary, qk_norm=False), torch.randn(2, T, 32)
    attention.record = True
    found, largest = read(attention(x)), attention.max_logit
    assert largest is not None
    assert largest.max() <= found <= largest.max() + math.log(T)
