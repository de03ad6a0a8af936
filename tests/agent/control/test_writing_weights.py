"""The graph of a forward proves the writing weights of a block, or the block is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.writing_weights import (
    NotProvenError,
    WritingWeightsSearch,
    edge_of,
    why_not_to_scale,
    writing_weights,
)
from koopmon.api import Point, Stack
from koopmon.plugins import select

B, T, D = 2, 5, 8


class Branches(nn.Module):
    """The parts of a transformer block. `rule` adds them to the stream."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias), nn.Linear(D, D, bias)
        self.up, self.down = nn.Linear(D, 2 * D, bias), nn.Linear(2 * D, D, bias)
        self.gate, self.router = nn.Linear(D, 2 * D, bias), nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.stacked = nn.Parameter(torch.randn(3, D, D))
        self.scale = nn.Parameter(torch.full((D,), 0.1))
        self.dropout = nn.Dropout(0.2)
        self.lora_a, self.lora_b = nn.Linear(D, 2, False), nn.Linear(2, D, False)
        self.rule = rule

    def attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))  # type: ignore[no-any-return]

    def mlp(self, h: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(h)))  # type: ignore[no-any-return]

    def swiglu(self, h: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]

    def mixture(self, h: Tensor) -> Tensor:
        """Every token to its best expert, by index, as in most implementations."""
        tokens = h.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, (expert(tokens[rows]) * weights[rows, None]).to(out.dtype))
        return out.view_as(h)

    def batched_mixture(self, h: Tensor) -> Tensor:
        weights = self.router(h).softmax(-1)
        each = torch.einsum("btd,edf->btef", functional.silu(h), self.stacked)
        return (each * weights[..., None]).sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def sequential(m: Any, x: Tensor) -> Tensor:
    x = x + m.attend(m.first(x))
    out: Tensor = x + m.mlp(m.second(x))
    return out


BOTH = ["out.weight", "out.bias", "down.weight", "down.bias"]
MLP = BOTH[2:]
WRITERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "Pre-LN": (sequential, BOTH),
    "SwiGLU": (lambda m, x: x + m.swiglu(m.first(x)), MLP),
    "dropout": (lambda m, x: x + m.dropout(m.mlp(m.first(x))), MLP),
    "parallel": (lambda m, x: x + m.attend(m.first(x)) + m.mlp(m.first(x)), BOTH),
    "parallel, one sum": (lambda m, x: m.attend(m.first(x)) + m.mlp(m.first(x)) + x, BOTH),
    "layer scale": (lambda m, x: x + m.scale * m.mlp(m.first(x)), MLP),
    "a factor": (lambda m, x: x + 0.3 * m.mlp(m.first(x)), MLP),
    "add with a factor": (lambda m, x: torch.add(x, m.mlp(m.first(x)), alpha=0.5), MLP),
    "difference": (lambda m, x: x - m.mlp(m.first(x)), MLP),
    "in place": (lambda m, x: x.clone().add_(m.mlp(m.first(x))), MLP),
    "gated output": (lambda m, x: x + torch.sigmoid(m.lora_b(m.lora_a(x))) * m.mlp(m.first(x)), MLP),
    "input as a factor": (lambda m, x: x + x * m.mlp(m.first(x)), MLP),
    "reshaped": (lambda m, x: x + m.mlp(m.first(x)).transpose(0, 1).reshape(T, B, D).transpose(0, 1), MLP),
    "a constant": (lambda m, x: x + m.mlp(m.first(x)) + torch.ones(D), MLP),
    "masked": (lambda m, x: x + m.mlp(m.first(x)).masked_fill(torch.rand(B, T, 1) > 0.5, 0.0), MLP),
    "stochastic depth": (lambda m, x: x + m.mlp(m.first(x)) * torch.rand(B, 1, 1).gt(0.2), MLP),
    "experts": (
        lambda m, x: x + m.mixture(m.first(x)),
        [f"experts.{number}.{kind}" for number in range(3) for kind in ("weight", "bias")],
    ),
    "batched experts": (lambda m, x: x + m.batched_mixture(m.first(x)), ["stacked"]),
    "checkpointed branch": (lambda m, x: x + checkpoint(m.mlp, m.first(x), use_reentrant=False), MLP),
    "trained LoRA and base": (
        lambda m, x: x + m.down(m.up(x)) + 2.0 * m.lora_b(m.lora_a(x)),
        ["down.weight", "down.bias", "lora_b.weight"],
    ),
    "a bias of its own": (lambda m, x: x + m.mlp(m.first(x)) + m.scale, [*MLP, "scale"]),
}
NOT_PROVEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "Post-LN": (lambda m, x: m.second(x + m.mlp(x)), "a normalisation lies between"),
    "Post-RMSNorm": (lambda m, x: (s := x + m.mlp(x)) * s.pow(2).mean(-1, True).rsqrt() * m.scale, "is scaled"),
    "sandwich": (lambda m, x: x + m.second(m.mlp(m.first(x))), "a normalisation lies between"),
    "sandwich of RMSNorm": (
        lambda m, x: x + (h := m.mlp(m.first(x))) * h.pow(2).mean(-1, True).rsqrt(),
        "in another place too",
    ),
    "no residual": (lambda m, x: m.mlp(m.first(x)), "not the sum of its input"),
    "twice the input": (lambda m, x: x + x + m.mlp(m.first(x)), "not the sum of its input"),
    "scaled input": (lambda m, x: 0.5 * x + m.mlp(m.first(x)), "scaled or normalised"),
    "gated input": (
        lambda m, x: (1.0 - (g := torch.sigmoid(m.out(x)))) * x + g * m.mlp(x),
        "RsubBackward lies between",
    ),
    "nothing written": (lambda m, x: x + 0.0, "no linear layer writes"),
    "activation last": (lambda m, x: x + torch.tanh(m.mlp(m.first(x))), "TanhBackward lies between"),
    "square": (lambda m, x: x + (h := m.mlp(m.first(x))) * h, "several trained factors"),
    "what is written is read": (lambda m, x: x + (h := m.mlp(m.first(x))) + m.out(h), "in another place too"),
    "one layer twice": (lambda m, x: x + m.out(torch.tanh(m.out(m.first(x)))), "in another place too"),
    "one weight twice": (
        lambda m, x: x + m.out(m.first(x)) + torch.tanh(m.first(x) @ m.out.weight) @ m.stacked[0],
        "in another place too",
    ),
    "a computed weight": (lambda m, x: x + m.first(x) @ torch.tanh(m.stacked[0]), "is no parameter itself"),
    "attention without an output layer": (
        lambda m, x: x + (m.first(x) @ m.first(x).transpose(1, 2)).softmax(-1) @ m.first(x),
        "no parameter itself",
    ),
}


def names_of(block: nn.Module, *, autocast: bool = False) -> list[str]:
    torch.manual_seed(1)
    x = torch.randn(B, T, D, requires_grad=True) * 1.0
    entry = edge_of(x)
    assert entry is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
    output = edge_of(y)
    assert output is not None
    names = {id(each): name for name, each in block.named_parameters()}
    return sorted(names[id(each)] for each in writing_weights(output, entry))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_weights_of_the_layers_that_are_added_to_the_stream_are_found(kind: str, autocast: bool) -> None:
    rule, expected = WRITERS[kind]
    torch.manual_seed(0)
    assert names_of(Branches(rule), autocast=autocast) == sorted(expected)


@pytest.mark.parametrize("kind", WRITERS)
def test_scaling_them_scales_the_written_part_of_the_map(kind: str) -> None:
    """With all branches but one at zero, x goes to x + c (y - x): the proof of the graph holds for the values."""
    rule, expected = WRITERS[kind]
    if kind in ("a constant", "dropout", "masked", "stochastic depth"):
        pytest.skip("it is random, or adds what does not depend on the input")
    torch.manual_seed(0)
    block = Branches(rule).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    weights = dict(block.named_parameters())
    with torch.no_grad():
        if kind == "Pre-LN":  # the second branch reads what the first one writes
            weights["out.weight"].zero_()
            weights["out.bias"].zero_()
        before = block(x) - x
        for name in expected:
            weights[name].mul_(0.6)
        after = block(x) - x
    assert before.norm() > 0.1
    torch.testing.assert_close(after, 0.6 * before)


@pytest.mark.parametrize("kind", NOT_PROVEN)
def test_other_blocks_are_refused_with_the_reason(kind: str) -> None:
    rule, reason = NOT_PROVEN[kind]
    torch.manual_seed(0)
    with pytest.raises(NotProvenError, match=reason):
        names_of(Branches(rule))


def test_a_frozen_base_under_lora_is_refused() -> None:
    block = Branches(lambda m, x: x + m.down(m.up(x)) + m.lora_b(m.lora_a(x)))
    block.down.requires_grad_(False)
    with pytest.raises(NotProvenError, match="frozen"):
        names_of(block)


def test_a_parametrised_weight_is_refused() -> None:
    block = Branches(sequential)
    block.out = weight_norm(block.out)
    with pytest.raises(NotProvenError, match="no parameter itself"):
        names_of(block)


def test_a_full_backward_hook_changes_nothing() -> None:
    block = Branches(sequential)
    block.register_full_backward_hook(lambda *_: None)
    assert names_of(block) == sorted(BOTH)


def test_a_graph_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koopmon.agent.control.writing_weights.MAX_NODES", 10)
    with pytest.raises(NotProvenError, match="more than 10 nodes"):
        names_of(Branches(sequential))


# The search over several forwards.


class Stream(nn.Module):
    def __init__(self, *rules: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, D)
        self.blocks = nn.ModuleList(Branches(rule) for rule in rules)

    def forward(self, tokens: Tensor) -> Tensor:
        h: Tensor = self.embedding(tokens) * 1.0
        for block in self.blocks:
            h = block(h)
        return h


def search_of(model: Any, *, forwards: int = 1) -> WritingWeightsSearch:
    points = tuple(Point(f"blocks.{layer}", block, layer) for layer, block in enumerate(model.blocks))
    search = WritingWeightsSearch(Stack("blocks", points))
    for point in points:
        point.module.register_forward_pre_hook(lambda _, args, at=point.layer: search.enter(at, args[0], None))
        point.module.register_forward_hook(lambda _, args, out, at=point.layer: search.leave(at, out))
    for seed in range(forwards):
        torch.manual_seed(seed)
        model(torch.randint(0, 11, (B, T)))
    return search


def test_the_search_finds_the_weights_of_each_block() -> None:
    model = Stream(sequential, WRITERS["parallel"][0])
    search = search_of(model)
    assert (search.refusal, search.missing) == ("", "")
    names = {id(each): name for name, each in model.named_parameters()}
    found = {layer: sorted(names[each] for each in weights) for layer, weights in search.weights.items()}
    assert found == {layer: sorted(f"blocks.{layer}.{name}" for name in BOTH) for layer in (0, 1)}


def test_the_first_block_that_is_refused_is_named() -> None:
    search = search_of(Stream(sequential, NOT_PROVEN["Post-LN"][0]))
    assert search.refusal.startswith("block 1: a normalisation")


def test_it_waits_for_experts_without_tokens() -> None:
    def expert_of_the_forward(m: Any, x: Tensor) -> Tensor:
        out: Tensor = x + m.experts[torch.initial_seed() % 3](m.first(x))
        return out

    assert search_of(Stream(expert_of_the_forward)).missing == "block 0 has not used experts.1.weight"
    assert search_of(Stream(expert_of_the_forward), forwards=3).missing == ""


def test_it_waits_for_a_branch_that_a_forward_has_left_out() -> None:
    def drops_its_mlp_at_first(m: Any, x: Tensor) -> Tensor:
        x = x + m.attend(m.first(x))
        return x if torch.initial_seed() == 0 else x + m.mlp(m.second(x))

    search = search_of(Stream(drops_its_mlp_at_first, sequential))
    assert search.missing == "block 0 has not used down.weight"
    assert search_of(Stream(drops_its_mlp_at_first, sequential), forwards=2).missing == ""


def test_forwards_without_gradients_show_nothing() -> None:
    model = Stream(sequential)
    with torch.no_grad():
        search = search_of(model)
    assert (search.refusal, search.missing) == ("", "block 0 has written nothing")


def test_a_frozen_embedding_is_refused() -> None:
    model = Stream(sequential)
    model.embedding.requires_grad_(False)
    assert search_of(model).refusal == "block 0: its input or its output has no gradient"


def why(model: Any, optimizer: torch.optim.Optimizer) -> str:
    search = search_of(model)
    assert (search.refusal, search.missing) == ("", "")
    return why_not_to_scale([each.values() for each in search.weights.values()], model, OptimizerSet(optimizer))


def test_weights_that_cannot_be_scaled_in_place_are_refused_with_their_name() -> None:
    model = Stream(sequential, sequential)
    optimizer = torch.optim.AdamW(model.parameters())
    assert why(model, optimizer) == ""
    copies = torch.optim.SGD([each.detach().clone() for each in model.parameters()], lr=0.1)
    assert why(model, copies) == "the optimizer does not update blocks.0.out.weight, but perhaps a copy of it"
    optimizer.state[model.blocks[1].down.weight]["master"] = model.blocks[1].down.weight.detach().double()
    assert why(model, optimizer) == "the optimizer keeps a copy of blocks.1.down.weight"


def test_a_tied_weight_is_refused() -> None:
    model = Stream(sequential)
    model.tied = nn.Linear(D, D)
    model.tied.weight = model.blocks[0].out.weight
    optimizer = torch.optim.AdamW(model.parameters())
    assert why(model, optimizer) == "blocks.0.out.weight and tied.weight are one parameter"


def test_layers_that_share_their_weights_are_refused() -> None:
    model = Stream(sequential, sequential)
    model.blocks[1].out = model.blocks[0].out
    assert "are one parameter" in why(model, torch.optim.AdamW(model.parameters()))


def test_a_subclass_of_tensors_is_refused() -> None:
    class Quantised(nn.Parameter):
        pass

    model = Stream(sequential)
    model.blocks[0].out.weight = Quantised(model.blocks[0].out.weight.detach())
    assert "is a Quantised" in why(model, torch.optim.AdamW(model.parameters()))


# Models of transformers.

SMALL: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {**SMALL, "num_attention_heads": 2, "intermediate_size": 32}
GPT2: dict[str, Any] = {"vocab_size": 11, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
PUBLISHED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "GPT2": (GPT2, {"attn.c_proj", "mlp.c_proj"}),
    "Llama": (HEADS, {"self_attn.o_proj", "mlp.down_proj"}),
    "GPTNeoX": (HEADS, {"attention.dense", "mlp.dense_4h_to_h"}),
    "Mixtral": ({**HEADS, "num_local_experts": 2, "num_key_value_heads": 2}, {"self_attn.o_proj", "experts.down_proj"}),
    "Mamba": ({**SMALL, "state_size": 4}, {"mixer.out_proj"}),
}


def search_of_published(name: str, config: dict[str, Any]) -> tuple[Any, WritingWeightsSearch]:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{name}Config")(**config)
    )
    model.train()
    stack = select(model).candidates[0]
    search = WritingWeightsSearch(stack)
    for point in stack.points:

        def enter(_: Any, args: Any, kwargs: Any, at: int = point.layer) -> None:
            search.enter(at, args[0] if args else kwargs["hidden_states"], None)

        def leave(_: Any, args: Any, out: Any, at: int = point.layer) -> None:
            search.leave(at, out[0] if isinstance(out, tuple) else out)

        point.entry.register_forward_pre_hook(enter, with_kwargs=True)
        point.module.register_forward_hook(leave)
    for _ in range(4):
        model(input_ids=torch.randint(0, 11, (B, T)))
    return model, search


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_published_models_are_found(name: str) -> None:
    config, expected = PUBLISHED[name]
    model, search = search_of_published(name, config)
    assert (search.refusal, search.missing) == ("", "")
    names = {id(each): path for path, each in model.named_parameters()}
    found = {names[each] for weights in search.weights.values() for each in weights}
    assert {path.removesuffix(".weight").removesuffix(".bias") for path in found} == {
        path.removesuffix(".weight").removesuffix(".bias")
        for path in names.values()
        if any(f"{each}." in f"{path}." for each in expected)
    }


def test_published_models_that_normalise_what_they_write_are_refused() -> None:
    _, search = search_of_published("Gemma2", {**HEADS, "num_key_value_heads": 2, "head_dim": 8})
    assert search.refusal.startswith("block 0: ")
