"""Claims of the transformer adapter, models that it leaves to others, and its messages without a match."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import koopmon
from koopmon.plugins import adapters, plugin_manager, select
from koopmon.profiling import capture_states
from tests.adapters.zoo import (
    HF_SIZES,
    B,
    D,
    L,
    T,
    llama,
    nano,
    padding,
    t5,
    tokens,
    torch_encoder_decoder,
    transformers,
    x_decoder,
)

torch.set_num_threads(1)


def test_a_shared_layer_is_a_block_at_each_depth() -> None:
    config = transformers.AlbertConfig(**HF_SIZES, embedding_size=16)
    found = koopmon.discover(transformers.AlbertModel(config), tokens())
    assert [point.name for point in found.points] == ["encoder.albert_layer_groups.0.albert_layers.0"] * 3


def test_stack_overrides_the_decoder_of_an_encoder_decoder() -> None:
    model, args, kwargs = t5()
    found = koopmon.discover(model, *args, **kwargs)
    assert found.flags == {"encoder-decoder"}
    assert found.rejected == {"encoder.block": "is a chain of 3 blocks, but 'decoder.block' comes later"}
    assert koopmon.discover(model, *args, stack="encoder.block", **kwargs).stack.name == "encoder.block"


def test_the_longer_stack_is_kept() -> None:
    model = nn.Transformer(D, 2, num_encoder_layers=4, num_decoder_layers=2, dim_feedforward=48, batch_first=True)
    found = koopmon.discover(model, torch.randn(B, T, D), torch.randn(B, 7, D))
    assert found.stack.name == "encoder.layers"
    assert "is longer" in found.rejected["decoder.layers"]


def test_stages_of_a_hierarchy_are_no_blocks() -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 4], num_heads=[2, 2], window_size=4
    )
    found = koopmon.discover(transformers.SwinModel(config), torch.randn(1, 3, 32, 32))
    assert found.stack.name == "encoder.layers.1.blocks"
    assert len(found.points) == 4


def test_a_module_around_the_encoder_is_no_block() -> None:
    """A Sequential of composite modules with equal shapes is a chain too, but its items are not the blocks."""
    layer = nn.TransformerEncoderLayer(D, 2, 48, batch_first=True)
    position = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0))
    model = nn.Sequential(position, nn.TransformerEncoder(layer, L, enable_nested_tensor=False))
    found = koopmon.discover(model, torch.randn(B, T, D))
    assert found.stack.name == "1.layers"
    assert len(found.points) == L


def test_several_residual_streams_are_not_flattened_into_one() -> None:
    model, args, _ = x_decoder(num_residual_streams=2)
    with pytest.raises(koopmon.DiscoveryError):
        koopmon.discover(model, *args)


@pytest.mark.parametrize("wrapped", ["compiled", "checkpointed"])
def test_names_in_configuration_fit_the_wrapped_model(wrapped: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, args, _ = nano()
    if wrapped == "compiled":
        outer: nn.Module = torch.compile(model, backend="eager")
        name = "_orig_mod.transformer"
    else:
        model.transformer = nn.ModuleList(checkpoint_wrapper(block) for block in model.transformer)
        outer, name = model, "transformer"
    found = koopmon.discover(outer, *args, stack="transformer")
    assert found.verified
    assert found.stack.name == name
    assert len(found.points) == L


class PlainBlock(nn.Module):
    """Chain without attention, residual or not."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.f = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if self.residual else self.f(x)


def test_layers_are_no_transformer() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU())
    assert adapters()["transformer"].specificity(model) == 0
    with pytest.raises(koopmon.DiscoveryError, match=r"4 x Linear, ReLU: single layers, no blocks"):
        koopmon.discover(model, torch.randn(B, T, D))


def test_convolutions_without_a_residual_are_refused() -> None:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)]
    with pytest.raises(koopmon.DiscoveryError, match="do not carry their input forward"):
        koopmon.discover(nn.Sequential(*blocks), torch.randn(1, 4, 8, 8))


def test_a_residual_chain_without_attention_is_claimed_with_doubt() -> None:
    model = nn.Sequential(*[PlainBlock(residual=True) for _ in range(L)])
    assert adapters()["transformer"].specificity(model) == 1
    found = koopmon.discover(model, torch.randn(B, T, D))
    assert found.verified
    assert found.flags == {"no-attention"}


def test_a_chain_that_is_not_residual_is_refused_unless_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[PlainBlock(residual=False) for _ in range(L)])
    batch = torch.randn(8, T, D)
    with pytest.raises(koopmon.DiscoveryError, match=r"do not carry their input forward: .* is -?0\.\d\d,"):
        koopmon.discover(model, batch)
    assert koopmon.discover(model, batch, stack="").verified


class OnePlugin:
    def __init__(self, adapter: koopmon.ArchitectureAdapter) -> None:
        self.adapter = adapter

    @koopmon.hookimpl
    def koopmon_architecture_adapters(self) -> list[koopmon.ArchitectureAdapter]:
        return [self.adapter]


@pytest.mark.parametrize(("claim", "winner"), [(19, "moe"), (20, "moe"), (21, "experts")])
def test_other_families_can_win(claim: int, winner: str) -> None:
    """Blocks with experts get the claim 10 as a transformer, and a higher one from an adapter of their own family."""
    config = transformers.MixtralConfig(**HF_SIZES, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    assert adapters()["transformer"].specificity(model) == 10

    class Experts(type(adapters()["transformer"])):  # type: ignore[misc]
        name = "experts"

        def specificity(self, model: nn.Module) -> int:
            return claim

    manager = plugin_manager()
    manager.register(OnePlugin(Experts()), "ours")
    selection = select(model, manager=manager)
    assert selection.adapter.name == winner
    assert {family.name for family in selection.families} == {"experts", "moe"}


@pytest.mark.parametrize("names", [("labels",), ("attention_mask",), ("labels", "attention_mask")])
def test_token_mask_of_a_language_model(names: tuple[str, ...]) -> None:
    model, args, _ = llama()
    given = {
        "labels": tokens().masked_fill(torch.arange(T) < 2, -100),
        "attention_mask": (~padding()).long(),
    }
    mask = adapters()["transformer"].token_mask(model, args, {name: given[name] for name in names})
    assert mask is not None
    expected = ~padding() if "attention_mask" in names else (torch.arange(T) >= 2).expand(B, T)
    assert torch.equal(mask, expected)


def test_token_mask_of_an_encoder_decoder_is_the_kept_stack_s() -> None:
    model, _, _ = t5()
    labels = tokens()[:, :7].masked_fill(torch.arange(7) > 4, -100)
    kwargs = {"input_ids": tokens(), "attention_mask": (~padding()).long(), "labels": labels}
    adapter = adapters()["transformer"]
    decoder, encoder = adapter.stacks(model)
    assert (decoder.name, encoder.name) == ("decoder.block", "encoder.block")
    decoder_mask = adapter.token_mask(model, (), kwargs, decoder)
    encoder_mask = adapter.token_mask(model, (), kwargs, encoder)
    assert decoder_mask is not None
    assert encoder_mask is not None
    assert torch.equal(decoder_mask, labels != -100)
    assert torch.equal(encoder_mask, ~padding())


def test_token_mask_of_torch_s_own_decoder() -> None:
    model, args, _ = torch_encoder_decoder()
    adapter = adapters()["transformer"]
    kwargs = {"src_key_padding_mask": padding(), "tgt_key_padding_mask": padding()[:, :7]}
    for stack in adapter.stacks(model):
        mask = adapter.token_mask(model, args, kwargs, stack)
        assert mask is not None
        assert torch.equal(mask, ~padding()[:, :7] if stack.name == "decoder.layers" else ~padding())


def test_token_mask_of_a_decoder_alone_is_its_attention_mask() -> None:
    """OPT calls its stack a decoder and has no encoder."""
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=D, ffn_dim=48, num_hidden_layers=L, num_attention_heads=2, word_embed_proj_dim=D
    )
    model = transformers.OPTModel(config)
    captured = capture_states(model, tokens(), attention_mask=(~padding()).long())
    assert "decoder" in captured.discovery.stack.name
    assert captured.masked
    assert captured.states[0].shape == (2 * T - 4, D)


def test_the_token_mask_is_read_without_a_walk_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snapshot of a training run calls it."""
    model, args, kwargs = t5()
    adapter = adapters()["transformer"]
    stacks = adapter.stacks(model)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    for stack in stacks:
        adapter.token_mask(model, args, kwargs, stack)


def test_token_mask_without_any() -> None:
    model, args, _ = nano()
    assert adapters()["transformer"].token_mask(model, args, {"mask": ~padding()}) is None
