"""Snapshots of models that skip blocks, repeat them, or run the stack several times in a forward."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koopmon.token_sampling import choose_rows
from koopmon.wire.messages import KssSettings
from tests.agent.models import VOCABULARY, Block, D, batch, paced
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
Run = Callable[["Stacked", Tensor], Tensor]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}
STEPS = 14
L = 6


class Stacked(nn.Module):
    """Tokens to one number. `run` calls the blocks and appends to `states` what it takes for h_0 ... h_L."""

    def __init__(self, run: Run, num_blocks: int = L) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(num_blocks))
        self.run, self.step, self.states = run, 0, []

    def forward(self, tokens: Tensor) -> Tensor:
        self.states: list[Tensor] = []
        self.draw = random.Random(self.step)
        return self.run(self, self.embedding(tokens) * 1.0).square().mean()

    def keep(self, h: Tensor) -> Tensor:
        self.states.append(h.detach().clone())
        return h


def dropping(share: float, call: Callable[[nn.Module, Tensor], Tensor] = lambda block, h: block(h)) -> Run:
    """LayerDrop: each block is skipped with the probability `share`."""

    def run(model: Stacked, h: Tensor) -> Tensor:
        model.keep(h)
        for block in model.blocks:
            h = model.keep(h if model.draw.random() < share else call(block, h))
        return h

    return run


def without(*skipped: int) -> Run:
    """The blocks `skipped` run in every third step only."""

    def run(model: Stacked, h: Tensor) -> Tensor:
        model.keep(h)
        for layer, block in enumerate(model.blocks):
            h = model.keep(h if layer in skipped and model.step % 3 else block(h))
        return h

    return run


def stochastic_depth(model: Stacked, h: Tensor) -> Tensor:
    """The deeper a block, the likelier it is skipped, up to one half."""
    model.keep(h)
    for layer, block in enumerate(model.blocks):
        h = model.keep(h if model.draw.random() < 0.5 * layer / (L - 1) else block(h))
    return h


def never_the_last(model: Stacked, h: Tensor) -> Tensor:
    model.keep(h)
    for block in list(model.blocks)[:-1]:
        h = model.keep(block(h))
    model.keep(h)
    return h


def traverse(model: Stacked, h: Tensor, keep: bool = False) -> Tensor:
    for block in [None, *model.blocks]:
        h = h if block is None else block(h)
        if keep:
            model.keep(h)
    return h


def twice(model: Stacked, h: Tensor) -> Tensor:
    return traverse(model, h, keep=True) * traverse(model, h.flip(1)).detach()


def twice_of_other_length(model: Stacked, h: Tensor) -> Tensor:
    return traverse(model, h[:, :5], keep=True).mean(1) * traverse(model, h).mean(1)


def twice_in_step(model: Stacked, a: Tensor) -> Tensor:
    """Two inputs go through each block before the next block runs."""
    b = a.flip(1)
    model.keep(a)
    for block in model.blocks:
        a, b = model.keep(block(a)), block(b)
    return a * b


def target_first(model: Stacked, h: Tensor) -> Tensor:
    """The pass without gradients comes first, as in self-distillation."""
    with torch.no_grad():
        target = traverse(model, h.detach().flip(1))
    return traverse(model, h, keep=True) - target


def twice_and_dropping(model: Stacked, h: Tensor) -> Tensor:
    return dropping(0.2)(model, h) + traverse(model, h.flip(1))


def looped(model: Stacked, h: Tensor) -> Tensor:
    """The whole stack runs three times, one behind the other: the first counts."""
    return traverse(model, traverse(model, traverse(model, h, keep=True)))


def shared(model: Stacked, h: Tensor) -> Tensor:
    """Each block runs three times in a row."""
    model.keep(h)
    for block in model.blocks:
        for _ in range(3):
            h = model.keep(block(h))
    return h


CASES: dict[str, tuple[Run, int, int]] = {
    "none skipped": (dropping(0.0), L, L),
    "one in ten": (dropping(0.1), L, L),
    "one in ten of many": (dropping(0.1), 24, 24),
    "one in four": (dropping(0.25), L, L),
    "the first": (without(0), L, L),
    "the last": (without(5), L, L),
    "the first, the last and neighbours": (without(0, 2, 3, 5), L, L),
    "stochastic depth": (stochastic_depth, L, L),
    "never the last": (never_the_last, L, L),
    "checkpointed": (dropping(0.2, lambda block, h: checkpoint(block, h, use_reentrant=False)), L, L),
    "checkpointed, reentrant": (dropping(0.2, lambda block, h: checkpoint(block, h, use_reentrant=True)), L, L),
    "siamese": (twice, L, L),
    "siamese of two lengths": (twice_of_other_length, L, L),
    "siamese in step": (twice_in_step, L, L),
    "target first": (target_first, L, L),
    "siamese and dropping": (twice_and_dropping, L, L),
    "looped": (looped, L, L),
    "one shared block": (shared, 1, 3),
    "two shared blocks": (shared, 2, 6),
}


def trained(model: Stacked, optimizer: torch.optim.Optimizer, call: Callable[[Tensor], Tensor], step: int) -> float:
    model.step = step
    loss = call(batch(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_holds_the_first_traversal_and_skipped_blocks_are_identities(
    case: str, root: bool, monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    run, num_blocks, num_layers = CASES[case]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Stacked(run, num_blocks))
    model, bare = models
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.05) for each in models)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(STEPS):
        loss = trained(model, optimizer, model if root else model.forward, step)
        assert loss == trained(bare, bare_optimizer, bare, step)
        expected[step] = bare.states
        arrived()
    status = agent.status()
    assert (status["reason"], status["errors"], status["num_layers"]) == ("", 0, num_layers)
    assert len(monitor.shards) >= (STEPS - 1 if case in ("none skipped", "siamese", "looped") else 4)
    for header, states in monitor.shards:
        full = expected[header.step]
        rows = choose_rows(full[0].shape[:-1].numel(), 20, seed=0, step=header.step)
        assert torch.equal(states, torch.stack([state.reshape(-1, D)[rows] for state in full]))
        assert header.num_points == num_layers + 1
    assert not any("no snapshots" in line for line in caplog.messages)


def test_a_block_that_was_replaced_is_followed(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = Stacked(dropping(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived = paced(agent, monitor)
    for step in range(40):
        if step == 3:
            model.blocks[2] = Block(D)
        trained(model, optimizer, model, step)
        arrived()
    assert len(monitor.shards) == 38, "all but the one that verifies the new block"
    assert sum("the blocks of Stacked have changed since koopmon attached" in line for line in caplog.messages) == 1


def test_a_stack_that_is_no_chain_is_given_up_in_one_line(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    def side_by_side(model: Stacked, h: Tensor) -> Tensor:
        return torch.stack([block(h) for block in model.blocks]).sum(0)

    model = Stacked(side_by_side)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    for step in range(6):
        trained(model, optimizer, model, step)
    assert not agent.enabled
    (line,) = [line for line in caplog.messages if "no snapshots" in line]
    assert "the output of blocks.0 is not the input of blocks.1" in line
    assert "KOOPMON_MODEL__STACK" in line


def test_blocks_of_a_later_stage_are_waited_for(monitor: ScriptedMonitor, agents: Attach) -> None:
    def staged(model: Stacked, h: Tensor) -> Tensor:
        return traverse(model, h, keep=True) if model.step > 8 else h

    model = Stacked(staged)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(14):
        trained(model, optimizer, model, step)
    monitor.wait(lambda: monitor.shards)
    assert agent.enabled


def test_kss_is_refused_where_one_block_is_several_layers(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Stacked(shared, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(3):
        trained(model, optimizer, model, step)
    command = monitor.command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=4, num_samples=16))
    monitor.wait(lambda: trained(model, optimizer, model, 3) and monitor.acked(command))
    assert monitor.ack(command).outcome == "refused"
    assert "one block is several layers" in monitor.ack(command).detail


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


def audio(name: str) -> Callable[[Any], nn.Module]:
    """A speech model at its own LayerDrop of 0.1."""
    return lambda library: getattr(library, f"{name}ForCTC")(
        getattr(library, f"{name}Config")(**SIZES, **CONVOLUTIONS, vocab_size=12)
    )


def sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 2000), "labels": torch.randint(1, 12, (2, 5))}


def albert(library: Any) -> nn.Module:
    return library.AlbertForMaskedLM(library.AlbertConfig(**SIZES, embedding_size=16, vocab_size=50))


def bart(library: Any) -> nn.Module:
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    config = library.BartConfig(
        **sides,
        vocab_size=50,
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_layerdrop=0.25,
        decoder_layerdrop=0.25,
        pad_token_id=0,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return library.BartForConditionalGeneration(config)


def words() -> dict[str, Tensor]:
    tokens = torch.randint(3, 50, (2, 8))
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize(
    ("make", "inputs", "stack"),
    [
        (audio("Wav2Vec2"), sounds, "wav2vec2.encoder.layers"),
        (audio("Hubert"), sounds, "hubert.encoder.layers"),
        (audio("WavLM"), sounds, "wavlm.encoder.layers"),
        (albert, words, "albert.encoder.albert_layer_groups.0.albert_layers"),
        (bart, words, "model.decoder.layers"),
    ],
)
def test_models_in_use_that_skip_or_share_layers(
    make: Callable[[Any], nn.Module],
    inputs: Callable[[], dict[str, Tensor]],
    stack: str,
    monitor: ScriptedMonitor,
    agents: Attach,
) -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make(library).train()
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])

    def step(seed: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        torch.manual_seed(seed)
        loss = model(**inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    arrived = paced(agent, monitor)
    for seed in range(16):
        assert step(seed, model, optimizer) == step(seed, bare, bare_optimizer)
        arrived()
    status = agent.status()
    assert (status["stack"], status["num_layers"], status["reason"]) == (stack, 4, "")
    assert len(monitor.shards) >= 6
