"""Taps inside compiled graphs: the graphs are those of a run without koopmon, and snapshots hold true states."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from koopmon.agent.capture.graph_taps import supported
from tests.agent.models import B, D, L, Model, T, batch, build, checkpointed, checkpointed_reentrant, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.convolutional import WATCHED

pytestmark = [
    pytest.mark.skipif(not supported(), reason="the compiler of this torch gets no taps"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the tracer inspects it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # in its imports
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


def convolutions(name: str) -> nn.Module:
    torch.manual_seed(0)
    return WATCHED[name]()


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
        pytest.param(build, whole("aot_eager", fullgraph=True), batch, id="functional", marks=pytest.mark.slow),
        pytest.param(lambda: build(in_place=True), whole("aot_eager"), batch, id="in-place residual"),
        pytest.param(lambda: build(run=checkpointed), whole("aot_eager"), batch, id="checkpointed"),
        pytest.param(build, whole(), lengths, id="lengths change"),
        pytest.param(
            build, whole("aot_eager", dynamic=True, fullgraph=True), lengths, id="dynamic", marks=pytest.mark.slow
        ),
        pytest.param(lambda: build(dtype=torch.bfloat16), whole("aot_eager"), batch, id="bfloat16"),
        pytest.param(encoder, whole("aot_eager"), batch, id="TransformerEncoder"),
        pytest.param(tuples, whole(fullgraph=True), batch, id="tuples and names"),
        pytest.param(lambda: convolutions("ResNet"), whole("aot_eager", fullgraph=True), batch, id="ResNet"),
        pytest.param(lambda: convolutions("ConvNeXt"), whole(), batch, id="ConvNeXt"),
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


def start(
    agents: Attach, monitor: ScriptedMonitor, make: Callable[[], nn.Module] = build
) -> tuple[Training, Any, Callable[[], None]]:
    """Attach to a model in one graph, and wait for the connection."""
    training = Training(make, whole(fullgraph=True), batch)
    agent = agents(training.model, training.optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    return training, agent, settled(agent, monitor)


def test_a_snapshot_holds_the_states_of_the_first_microbatch(monitor: ScriptedMonitor, agents: Attach) -> None:
    training, _, settle = start(agents, monitor)
    states: list[list[Tensor]] = []
    for step in range(3):
        twin = copy.deepcopy(training.model)
        entered: list[Tensor] = []
        assert isinstance(twin, Model)
        for block in twin.blocks:
            block.register_forward_pre_hook(lambda _, args, into=entered: into.append(args[0].detach().flatten(0, 1)))
        twin.blocks[-1].register_forward_hook(
            lambda _, args, out, into=entered: into.append(out.detach().flatten(0, 1))
        )
        loss_of(twin, batch(2 * step))
        states.append(entered)
        training.optimizer.zero_grad()
        for micro in range(2):
            loss_of(training.called, batch(2 * step + micro)).backward()
        training.optimizer.step()
        settle()
    assert len(monitor.shards) == 2
    for header, sent in monitor.shards:
        expected = torch.stack(states[header.training.step])
        # Tokens that are equal in the embedding differ behind the last block.
        rows = [int((expected[-1] - row).abs().sum(1).argmin()) for row in sent[-1]]
        torch.testing.assert_close(sent, expected[:, rows])
        assert header.num_samples == B * T
        torch.testing.assert_close(sent[-1].sum(0), expected[-1].sum(0))  # each token once


def test_an_evaluation_between_two_steps_is_no_snapshot(monitor: ScriptedMonitor, agents: Attach) -> None:
    training, agent, settle = start(agents, monitor)
    for step in range(3):
        training.train(range(step, step + 1), settle)
        with torch.no_grad():
            loss_of(training.called, batch(99))
    assert (agent.status()["sent"], agent.status()["taps_missing"]) == (2, 0)


def test_nothing_is_compiled_anew_when_the_agent_is_closed(monitor: ScriptedMonitor, agents: Attach) -> None:
    training, agent, settle = start(agents, monitor)
    training.train(range(2), settle)
    agent.close()
    training.train(range(2, 4))
    assert graphs() == (1, 0)
    assert len(monitor.shards) == 1


def test_files_copies_and_exports_hold_nothing_of_the_taps(monitor: ScriptedMonitor, agents: Attach) -> None:
    training, _, settle = start(agents, monitor)
    training.train(range(2), settle)
    file = io.BytesIO()
    torch.save(training.model, file)
    assert b"koopmon" not in file.getvalue()
    twin = copy.deepcopy(training.called)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    plain = torch.export.export(build(), (batch(0),))
    exported = torch.export.export(training.model, (batch(0),))
    assert [node.target for node in exported.graph.nodes] == [node.target for node in plain.graph.nodes]


def test_a_transform_in_a_graph_gets_no_taps(monitor: ScriptedMonitor, agents: Attach) -> None:
    """The taps write to tensors from outside, which torch.func refuses."""
    training, agent, _ = start(agents, monitor)
    parameters = {name: each.detach() for name, each in training.model.named_parameters()}

    def loss(values: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return loss_of(lambda each: torch.func.functional_call(training.model, values, (each,)), tokens)  # type: ignore[arg-type]

    gradients = torch.compile(torch.func.grad(loss), backend="eager")(parameters, batch(0))
    plain = torch.func.grad(loss)(parameters, batch(0))
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert not agent._runtime.taps.stacks.graphs.traced


@pytest.mark.parametrize("run", [checkpointed, checkpointed_reentrant])
def test_a_checkpoint_that_the_backend_leaves_alone_gets_no_taps(
    run: Any, monitor: ScriptedMonitor, agents: Attach
) -> None:
    expected = Training(lambda: build(run=run), whole(), batch).train(range(STEPS))
    training, agent, _ = start(agents, monitor, lambda: build(run=run))
    assert equal(training.train(range(STEPS)), expected)
    status = agent.status()
    assert (status["sent"], status["errors"], status["taps_missing"] > 0) == (0, 0, True)


@pytest.mark.parametrize("run", [None, checkpointed])
def test_a_graph_that_is_split_for_the_ranks_keeps_its_taps(
    run: Any, monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel splits the graph at its buckets, of which these are many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)

    def compile_(model: nn.Module) -> nn.Module:
        compiled = torch.compile(model, backend="aot_eager")
        return nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.002)

    try:
        expected = Training(lambda: build(run=run), compile_, batch).train(range(STEPS))
        training = Training(lambda: build(run=run), compile_, batch)
        agent = agents(training.called, training.optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
        monitor.wait(lambda: agent.status()["connected"])
        assert equal(training.train(range(STEPS), settled(agent, monitor)), expected)
        status = agent.status()
        assert (status["sent"], status["taps_missing"], status["errors"]) == (STEPS - 1, 0, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("make", [build, lambda: convolutions("ResNet")], ids=["transformer", "ResNet"])
def test_inductor_computes_the_same(make: Callable[[], nn.Module], monitor: ScriptedMonitor, agents: Attach) -> None:
    compile_ = whole("inductor", fullgraph=True)
    expected = Training(make, compile_, batch).train(range(STEPS))
    training = Training(make, compile_, batch)
    agent = agents(training.model, training.optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    assert equal(training.train(range(STEPS), settled(agent, monitor)), expected)
    assert graphs() == (1, 0)
    assert (agent.status()["sent"], agent.status()["taps_missing"]) == (STEPS - 1, 0)


def test_a_second_model_of_the_class_takes_the_taps_away_and_that_is_said(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler takes the graph that it made last. It does not look whether the first model has hooks."""
    training, agent, settle = start(agents, monitor)
    training.train(range(2), settle)
    other = build()
    called = torch.compile(other, backend="eager", fullgraph=True)
    for step in range(2, 7):
        loss_of(called, batch(step)).backward()
        training.train(range(step, step + 1))
    assert agent.status()["taps_missing"] >= 3
    assert sum("a second model of its class was compiled" in line for line in caplog.messages) == 1
