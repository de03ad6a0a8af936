"""Taps inside compiled graphs: the graphs are those of a run without koopmon, and snapshots hold true states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.graph_taps import supported
from tests.agent.models import D, L, Model, T, batch, build, checkpointed, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = [
    pytest.mark.skipif(not supported(), reason="the compiler of this torch gets no taps"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the tracer inspects it
]
EVERY_STEP = {"cadence": {"dense_every": 1}}
STEPS = 4
Attach = Callable[..., Any]
Batch = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> tuple[int, int]:
    """Return the numbers of graphs and of graph breaks since the start of the test."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


class Training:
    """A compiled training of a fresh model; `train` returns the losses and gradients of its steps."""

    def __init__(
        self, make: Callable[[], nn.Module], compile_: Callable[[nn.Module], nn.Module], batches: Batch
    ) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model = make()
        self.called = compile_(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.batches = batches

    def train(self, steps: range, settle: Callable[[], Any] = lambda: None) -> list[Any]:
        found: list[Any] = []
        for step in steps:
            loss = loss_of(self.called, self.batches(step))
            self.optimizer.zero_grad()
            loss.backward()
            gradients = [None if each.grad is None else each.grad.clone() for each in self.model.parameters()]
            self.optimizer.step()
            settle()
            found.append((loss.item(), gradients))
        return found


def equal(first: list[Any], second: list[Any]) -> bool:
    return all(
        a[0] == b[0] and all(x is y is None or torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
        for a, b in zip(first, second, strict=True)
    )


def settled(agent: Any, monitor: ScriptedMonitor) -> Callable[[], None]:
    def wait() -> None:
        def told() -> bool:
            status = agent.status()
            return bool(status["sent"] + sum(status["dropped"].values()) + status["taps_missing"] >= status["step"] - 1)

        monitor.wait(told)

    return wait


def whole(backend: str = "eager", **options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: torch.compile(model, backend=backend, **options)  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, D), nn.Linear(D, 11)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, L, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens), mask=mask, is_causal=True))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder()


class Tuples(Model):
    """Blocks that return the state in a tuple, as older transformers do, and take it by name."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

        def forward(self, *, hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, None]:
            change = self.down(torch.tanh(self.up(self.norm(hidden_states))))
            return hidden_states + scale * change, None

    def __init__(self) -> None:
        super().__init__(lambda block, h: block(hidden_states=h, scale=torch.ones(1))[0])
        self.blocks = nn.ModuleList(Tuples.Block() for _ in range(L))


def tuples() -> nn.Module:
    torch.manual_seed(0)
    return Tuples()


def family(name: str) -> nn.Module:
    """Build a tiny language model of transformers; its output is the logits."""
    transformers = pytest.importorskip("transformers")
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=11, n_positions=T, n_embd=D, n_layer=L, n_head=2)
    else:
        sizes = {"hidden_size": D, "intermediate_size": 2 * D, "num_hidden_layers": L, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens, use_cache=False).logits

    return Logits()


def lengths(step: int) -> Tensor:
    """Draw batches whose size and length change."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, ((4, 8), (4, 6), (3, 7), (2, 5))[step % 4], generator=generator)


@pytest.mark.parametrize(
    ("make", "compile_", "batches"),
    [
        pytest.param(build, whole(), batch, id="optimized module"),
        pytest.param(build, whole(fullgraph=True), batch, id="full graph"),
        pytest.param(build, in_place, batch, id="in place"),
        pytest.param(build, whole("aot_eager", fullgraph=True), batch, id="functional"),
        pytest.param(lambda: build(in_place=True), whole("aot_eager"), batch, id="in-place residual"),
        pytest.param(lambda: build(run=checkpointed), whole("aot_eager"), batch, id="checkpointed"),
        pytest.param(build, whole(), lengths, id="lengths change"),
        pytest.param(build, whole("aot_eager", dynamic=True, fullgraph=True), lengths, id="dynamic"),
        pytest.param(lambda: build(dtype=torch.bfloat16), whole("aot_eager"), batch, id="bfloat16"),
        pytest.param(encoder, whole("aot_eager"), batch, id="TransformerEncoder"),
        pytest.param(tuples, whole(fullgraph=True), batch, id="tuples and names"),
        pytest.param(lambda: family("GPT2"), whole(), batch, id="GPT2"),
        pytest.param(lambda: family("Llama"), whole(), batch, id="Llama"),
    ],
)
@pytest.mark.parametrize("root", ["model", "compiled"])
def test_a_compiled_model_is_watched_and_stays_as_it_is(
    make: Callable[[], nn.Module],
    compile_: Callable[[nn.Module], nn.Module],
    batches: Batch,
    root: str,
    monitor: ScriptedMonitor,
    agents: Attach,
) -> None:
    plain = Training(make, compile_, batches)
    torch.manual_seed(1)  # dropout
    expected = plain.train(range(STEPS))
    made = graphs()
    training = Training(make, compile_, batches)
    attached = training.model if root == "model" else training.called
    agent = agents(attached, training.optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    torch.manual_seed(1)
    found = training.train(range(STEPS), settled(agent, monitor))
    assert equal(found, expected)
    assert graphs() == made
    status = agent.status()
    assert (status["sent"], status["taps_missing"], status["errors"]) == (STEPS - 1, 0, 0)
    assert {header.num_points for header, _ in monitor.shards} == {L + 1}
    assert {header.width for header, _ in monitor.shards} == {D}
