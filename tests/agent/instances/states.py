"""K11: states in containers, behind keywords, in other layouts, and several streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.agent.instances.battery import (
    B,
    Battery,
    Block,
    D,
    T,
    Watch,
    blocks,
    sgd,
    update,
    vectors,
)

battery = Battery()
case = battery.case


class Stream(nn.Module):
    """Inputs (B, T, D) to one number. `run(blocks, x)` calls the blocks."""

    def __init__(self, kind: Any, run: Any, count: int = 4) -> None:
        super().__init__()
        self.enter, self.blocks, self.leave = nn.Linear(D, D), blocks(count, kind), nn.Linear(D, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.enter(x))


def train(watch: Watch, model: nn.Module, steps: int = 8, shape: tuple[int, ...] = (B, T, D)) -> Iterator[Tensor]:
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(steps):
        yield update(model(vectors(step, *shape)).square().mean(), optimizer)


@case()
def tuple_of_state_and_loss(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, loss = pair
            y = super().forward(x)
            return y, loss + y.square().mean()

    def run(model: Stream, x: Tensor) -> Tensor:
        pair = (x, torch.zeros(()))
        for block in model.blocks:
            pair = block(pair)
        return pair[0] * 0.1 + pair[1]

    yield from train(watch, Stream(Layer, run))


@case()
def dict_with_several_entries(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**batch, "features": super().forward(batch["features"])}

    def run(model: Stream, x: Tensor) -> Tensor:
        batch = {"mask": torch.ones(B, T), "positions": torch.randn(B, T, 3), "features": x}
        for block in model.blocks:
            batch = block(batch)
        return batch["features"]

    yield from train(watch, Stream(Layer, run))


@dataclass
class State:
    mask: Tensor
    hidden: Tensor
    depth: int = 0


@case()
def frozen_dataclass(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, state: State) -> State:
            return replace(state, hidden=super().forward(state.hidden), depth=state.depth + 1)

    def run(model: Stream, x: Tensor) -> Tensor:
        state = State(torch.ones(B, T, 1), x)
        for block in model.blocks:
            state = block(state)
        return state.hidden

    yield from train(watch, Stream(Layer, run))


@case()
def model_output(watch: Watch) -> Iterator[Tensor]:
    outputs = __import__("pytest").importorskip("transformers.modeling_outputs")

    class Layer(Block):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Any:
            return outputs.BaseModelOutput(
                last_hidden_state=super().forward(hidden_states), attentions=(hidden_states.detach(),)
            )

    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x, attention_mask=torch.ones(B, T)).last_hidden_state
        return x

    yield from train(watch, Stream(Layer, run))


@case()
def rotary_table_first(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, rope: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return super().forward(x * rope[0] + x.roll(1, -1) * rope[1])

    def run(model: Stream, x: Tensor) -> Tensor:
        angles = 0.01 * torch.arange(T)[:, None] * torch.ones(D)
        for block in model.blocks:
            x = block((angles.cos(), angles.sin()), x)
        return x

    yield from train(watch, Stream(Layer, run))


@case()
def condition_of_the_same_shape_first(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, condition: Tensor, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * condition

    def run(model: Stream, x: Tensor) -> Tensor:
        condition = torch.tanh(x)
        for block in model.blocks:
            x = block(condition, x)
        return x

    yield from train(watch, Stream(Layer, run))


@case()
def keywords_alone(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, *, mask: Tensor, temb: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return mask, super().forward(x) * mask + 0.01 * temb

    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            _, x = block(x=x, temb=torch.ones(B, 1, D), mask=torch.ones(B, T, 1))
        return x

    yield from train(watch, Stream(Layer, run))


@case()
def hidden_and_residual(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            residual = hidden if residual is None else hidden + residual
            return self.update(residual), residual

    def run(model: Stream, x: Tensor) -> Tensor:
        residual = None
        for block in model.blocks:
            x, residual = block(x, residual)
        return x + residual

    yield from train(watch, Stream(Layer, run))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.out = nn.GroupNorm(1, D), nn.Conv1d(D, 2 * D, 3, padding=1), nn.Conv1d(2 * D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.conv(self.norm(x))))


@case()
def channels_before_time(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for block in model.blocks:
            x = block(x)
        return x

    yield from train(watch, Stream(Conv, run), shape=(B, 30, D))


@case()
def gated_convolutions_with_skips(watch: Watch) -> Iterator[Tensor]:
    """As WaveNet: each block returns the state and a skip of the same shape."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(D, 2 * D, 3, padding=1), nn.Conv1d(D, 2 * D, 1)

        def forward(self, x: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.conv(x + 0.1 * mel).chunk(2, 1)
            update, skip = self.out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            return (x + update) * 0.5**0.5, skip

    def run(model: Stream, x: Tensor) -> Tensor:
        x, mel = x.transpose(1, 2), x.transpose(1, 2).detach()
        total = 0.0
        for block in model.blocks:
            x, skip = block(x, mel)
            total = total + skip
        return total

    yield from train(watch, Stream(Layer, run), shape=(B, 30, D))


@case()
def state_by_its_name(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
            return super().forward(hidden_states + 0.01 * position_bias)

    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(position_bias=torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)), hidden_states=x)
        return x

    yield from train(watch, Stream(Layer, run))


@case(None, told="no snapshots|missed")
def nested_tensors(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    def run(model: Stream, x: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.tensor([0, 4, 9, B * T]))
        for block in model.blocks:
            jagged = block(jagged)
        return jagged.values()

    yield from train(watch, Stream(Layer, run), 12)


@case()
def image_and_text_streams(watch: Watch) -> Iterator[Tensor]:
    """Two streams of two lengths, joined in the attention of each block."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = Block(), Block()

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.cat([encoder_hidden_states, hidden_states], 1).mean(1, keepdim=True)
            return self.text(encoder_hidden_states + 0.1 * both), self.image(hidden_states + 0.1 * both + 0.01 * temb)

    def run(model: Stream, x: Tensor) -> Tensor:
        text = x[:, :2]
        for block in model.blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=torch.ones(B, 1, D))
        return torch.cat([text, x], 1)

    yield from train(watch, Stream(Layer, run))


@case()
def hyper_connections(watch: Watch) -> Iterator[Tensor]:
    """n streams (B, T, n, D), mixed by each block."""

    class Layer(Block):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Parameter(torch.ones(3) / 3), nn.Parameter(torch.ones(3))
            self.mix = nn.Parameter(torch.eye(3) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            read = torch.einsum("btnd,n->btd", x, self.into)
            return torch.einsum("btnd,nm->btmd", x, self.mix) + self.update(read)[:, :, None] * self.out[:, None]

    def run(model: Stream, x: Tensor) -> Tensor:
        x = x[:, :, None].expand(-1, -1, 3, -1)
        for block in model.blocks:
            x = block(x)
        return x.sum(2)

    yield from train(watch, Stream(Layer, run))


@case()
def attention_over_residuals(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        past = [x]
        for block in model.blocks:
            keys = torch.stack(past)
            weights = (keys * past[-1]).sum(-1, keepdim=True).mul(0.1).softmax(0)
            past.append(block((weights * keys).sum(0)))
        return past[-1]

    yield from train(watch, Stream(Block, run))


@case()
def packed_without_a_batch(watch: Watch) -> Iterator[Tensor]:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x, cu_seqlens=torch.tensor([0, 7, 20, 24]), max_seqlen=13)
        return x

    yield from train(watch, Stream(Layer, run), shape=(B * T, D))


@case()
def packed_with_another_length_in_each_step(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    model = Stream(Block, run)
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(model(vectors(step, 10 + 3 * step, D)).square().mean(), optimizer)


@case()
def time_before_batch(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for block in model.blocks:
            x = block(x)
        return x

    yield from train(watch, Stream(Block, run))


@case()
def image_with_channels_last(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x, (4, 3)) if isinstance(block, Windowed) else block(x)
        return x

    class Windowed(Block):
        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
            return super().forward(x.roll((1, 1), (1, 2))).roll((-1, -1), (1, 2))

    yield from train(watch, Stream(Windowed, run), shape=(B, 4, 3, D))


@case(None, told="no snapshots")
def written_in_place_into_a_list(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, streams: list[Tensor]) -> None:
            streams[0] = super().forward(streams[0])

    def run(model: Stream, x: Tensor) -> Tensor:
        streams = [x]
        for block in model.blocks:
            block(streams)
        return streams[0]

    yield from train(watch, Stream(Layer, run), 12)


@case()
def scalars_and_vectors(watch: Watch) -> Iterator[Tensor]:
    """An equivariant network: s (N, D) and v (N, D, 3), as PaiNN."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.gate = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, s: Tensor, v: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.up(s + 0.1 * s[edges]))
            return s + self.down(h) + v.square().sum(-1), v + self.gate(h)[..., None] * v[edges]

    def run(model: Stream, x: Tensor) -> Tensor:
        s, v, edges = x, 0.1 * x[..., None].repeat(1, 1, 3), torch.arange(B * T).roll(1)
        for block in model.blocks:
            s, v = block(s, v, edges)
        return s + v.sum(-1)

    yield from train(watch, Stream(Layer, run), shape=(B * T, D))


@case()
def pair_and_single(watch: Watch) -> Iterator[Tensor]:
    """As in models of proteins: a pair state (B, T, T, D) beside the single one (B, T, D)."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.single, self.pair = Block(), Block()

        def forward(self, s: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return self.single(s + 0.1 * z.mean(2)), self.pair(z + 0.1 * (s[:, :, None] + s[:, None]))

    def run(model: Stream, x: Tensor) -> Tensor:
        z = x[:, :, None] * x[:, None]
        for block in model.blocks:
            x, z = block(x, z, mask=torch.ones(B, T))
        return x + z.mean(2)

    yield from train(watch, Stream(Layer, run))


class Answer(NamedTuple):
    attention: Tensor
    state: Tensor


@case()
def memory_beside_the_state(watch: Watch) -> Iterator[Tensor]:
    """A decoder block that takes (memory, x) and returns (attention, x) of one shape."""

    class Layer(Block):
        def forward(self, memory: Tensor, x: Tensor) -> Answer:
            return Answer(memory.softmax(-1), super().forward(x + 0.1 * memory))

    def run(model: Stream, x: Tensor) -> Tensor:
        memory = torch.randn(B, T, D, generator=torch.Generator().manual_seed(3))
        for block in model.blocks:
            x = block(memory, x).state
        return x

    yield from train(watch, Stream(Layer, run))


@case()
def graph_with_features_of_edges(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
            source, target = edge_index
            message = x[source] + edge_attr
            total = torch.zeros_like(x).index_add(0, target, message)
            return x + 0.1 * torch.relu(self.norm(total)), edge_attr + 0.1 * torch.tanh(self.down(self.up(message)))

    def run(model: Stream, x: Tensor) -> Tensor:
        nodes = len(x)
        edges = torch.stack([torch.arange(2 * nodes) % nodes, (torch.arange(2 * nodes) * 5 + 1) % nodes])
        attributes = torch.tanh(x.repeat(2, 1))
        for block in model.blocks:
            x, attributes = block(x, edges, attributes)
        return x

    yield from train(watch, Stream(Layer, run), shape=(B * T, D))


class Batch:
    """An object with attributes, as a batch of graphs."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.ptr = x, torch.tensor([0, 3])


@case()
def attribute_of_one_object(watch: Watch) -> Iterator[Tensor]:
    class Layer(Block):
        def forward(self, batch: Batch) -> Batch:
            batch.x = super().forward(batch.x)
            return batch

    def run(model: Stream, x: Tensor) -> Tensor:
        batch = Batch(x)
        for block in model.blocks:
            batch = block(batch)
        return batch.x

    yield from train(watch, Stream(Layer, run))


@case()
def half_precision_under_autocast(watch: Watch) -> Iterator[Tensor]:
    def run(model: Stream, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for block in model.blocks:
                x = block(x)
        return x.float()

    yield from train(watch, Stream(Block, run))


@case()
def kwargs_of_the_root_too(watch: Watch) -> Iterator[Tensor]:
    """The loop unpacks a batch into keywords, and one of them is the padding mask."""

    def run(model: Stream, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x=x)
        return x

    class Masked(Stream):
        def forward(self, *, inputs: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(inputs) * attention_mask[..., None]

    model = Masked(Block, run)
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        batch = {"inputs": vectors(step), "attention_mask": (torch.arange(T) < 4).expand(B, T)}
        yield update(model(**batch).square().mean(), optimizer)
