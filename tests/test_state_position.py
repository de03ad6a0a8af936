"""The state is found wherever it stands in a block's arguments and in its return value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import koopmon
from koopmon.api import StatePosition
from koopmon.profiling import capture_states
from koopmon.state_position import SUM, argument_tensors, block_input, block_output, output_tensors, with_block_output
from tests.stacks import B, D, L, Listed, T

torch.set_num_threads(1)


class Carried(NamedTuple):
    rotary: Tensor
    x: Tensor


@dataclass
class Streams:
    aux: Tensor | None
    x: Tensor


class Carrier:
    def __init__(self, x: Tensor) -> None:
        self.x, self.cache = x, {"of": "what"}


class Part(nn.Module):
    """x + f(x), called as `form` says."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(D, D))
        self.form = form

    def f(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.linear(x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(self.f, *args, **kwargs)


class Model(nn.Module):
    """`loop` carries the state from block to block. It returns the last state; `states` are what it must find."""

    def __init__(self, form: Callable[..., Any], loop: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Part(form) for _ in range(L))
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        rotary = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))
        return self.loop(self.blocks, x, rotary)


def second_argument(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    for block in blocks:
        x = block(rotary, x)
    return x


def both_returned(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    for block in blocks:
        rotary, x = block(rotary, x)
    return x


def swapped(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    """As in joint transformers: block(image, text) gives (text, image)."""
    text = rotary[:, :3]
    for block in blocks:
        text, x = block(x, text)
    return x


def swapped_alike(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    text = rotary
    for block in blocks:
        text, x = block(x, text)
    return x


def second_result(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    for block in blocks:
        _, x = block(x)
    return x


def keyword(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    for block in blocks:
        x = block(rotary, stream=x)
    return x


def dictionary(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    state = {"rotary": rotary, "x": x}
    for block in blocks:
        state = block(state)
    return state["x"]


def dataclass_state(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    state = Streams(None, x)
    for block in blocks:
        state = block(state)
    return state.x


def named_tuple(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    state = Carried(rotary, x)
    for block in blocks:
        state = block(state)
    return state.x


def object_state(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    state = Carrier(x)
    for block in blocks:
        state = block(state)
    return state.x


def update_and_residual(f: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """As in fused normalisations: a block adds both at its start, and returns its own update beside the residual."""
    residual = hidden if residual is None else hidden + residual
    return f(residual) - residual, residual


def object_in_place(f: Any, state: Carrier) -> Carrier:
    state.x = f(state.x)
    return state


def nested(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
    state: Any = (rotary, {"streams": [x]})
    for block in blocks:
        state = block(state)
    return state[1]["streams"][0]


def in_place(f: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["x"] = f(state["x"])
    return state


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], StatePosition | None]] = {
    "block(x)": (lambda f, x: f(x), lambda blocks, x, _: blocks[2](blocks[1](blocks[0](x))), None),
    "block(rope, x)": (lambda f, rotary, x: f(x), second_argument, StatePosition((1,), ())),
    "block(rope, x) -> (rope, x)": (lambda f, rotary, x: (rotary, f(x)), both_returned, StatePosition((1,), (1,))),
    "block(rope, x) -> [rope, x]": (lambda f, rotary, x: [rotary, f(x)], both_returned, StatePosition((1,), (1,))),
    "block(x, text) -> (text, x)": (lambda f, x, text: (text * 1.1, f(x)), swapped, StatePosition((0,), (1,))),
    "of one shape": (lambda f, x, text: (text * 1.1, f(x)), swapped_alike, StatePosition((0,), (1,))),
    "block(x) -> (weights, x)": (lambda f, x: (x[..., :1] * 0, f(x)), second_result, StatePosition((0,), (1,))),
    "block(rope, stream=x)": (lambda f, rotary, stream: f(stream), keyword, StatePosition(("stream",), ())),
    "dict": (lambda f, state: {**state, "x": f(state["x"])}, dictionary, StatePosition((0, "x"), ("x",))),
    "dict in place": (in_place, dictionary, StatePosition((0, "x"), ("x",))),
    "ordered dict": (
        lambda f, state: OrderedDict(rotary=state["rotary"], x=f(state["x"])),
        dictionary,
        StatePosition((0, "x"), ("x",)),
    ),
    "dataclass": (lambda f, state: Streams(None, f(state.x)), dataclass_state, StatePosition((0, "x"), ("x",))),
    "named tuple": (lambda f, state: Carried(state[0], f(state[1])), named_tuple, StatePosition((0, 1), (1,))),
    "object": (lambda f, state: Carrier(f(state.x)), object_state, StatePosition((0, "x"), ("x",))),
    "object in place": (object_in_place, object_state, StatePosition((0, "x"), ("x",))),
    "nested": (
        lambda f, state: (state[0], {"streams": [f(state[1]["streams"][0])]}),
        nested,
        StatePosition((0, 1, "streams", 0), (1, "streams", 0)),
    ),
}


def made(case: str) -> Model:
    return Model(*CASES[case][:2])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_pair_that_chains_is_the_state(case: str, residual: bool) -> None:
    found = koopmon.discover(made(case), torch.randn(B, T, D), adapter=Listed("blocks", residual=residual))
    assert found.stack.position == CASES[case][2]


@pytest.mark.parametrize("case", CASES)
def test_a_profile_reads_the_state_where_it_is(case: str) -> None:
    model, x = made(case), torch.randn(B, T, D)
    expected = [x]
    for block in model.blocks:
        expected.append(block.f(expected[-1]))
    captured = capture_states(model, x, adapter=Listed("blocks"), num_samples=B * T)
    ordered = [sorted(map(tuple, state.tolist())) for state in captured.states]
    assert ordered == [sorted(map(tuple, state.reshape(-1, D).tolist())) for state in expected]


@pytest.mark.parametrize("first", [None, 0.0])
def test_hidden_and_residual_are_one_state(first: float | None) -> None:
    def loop(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
        hidden, residual = x, None if first is None else torch.zeros_like(x)
        for block in blocks:
            hidden, residual = block(hidden, residual)
        return hidden + residual

    model, x = Model(update_and_residual, loop), torch.randn(B, T, D)
    captured = capture_states(model, x, adapter=Listed("blocks"), num_samples=B * T)
    assert captured.discovery.stack.position == StatePosition(SUM, SUM)
    expected = [x]
    for block in model.blocks:
        expected.append(block.f(expected[-1]))
    for state, full in zip(captured.states, expected, strict=True):
        rows = {tuple(row) for row in state.round(decimals=3).tolist()}
        assert len(rows & {tuple(row) for row in full.reshape(-1, D).round(decimals=3).tolist()}) >= B * T - 1


def test_what_is_only_passed_on_is_no_state() -> None:
    def loop(blocks: Any, x: Tensor, rotary: Tensor) -> Tensor:
        for block in blocks:
            x, rotary = block(x.tanh().detach(), rotary)
        return x

    model = Model(lambda f, x, rotary: (f(x), rotary), loop)
    with pytest.raises(koopmon.DiscoveryError, match="is not the input of"):
        koopmon.discover(model, torch.randn(B, T, D), adapter=Listed("blocks"))


def test_an_adapter_may_insist_on_its_own_reading() -> None:
    class Exact(Listed):
        def block_output(self, module: nn.Module, output: Any) -> Tensor | None:
            return super().block_output(module, output)

    class Open(Exact):
        fixed_state = False

    assert (Listed.fixed_state, Exact.fixed_state) == (False, True)
    assert koopmon.discover(made("block(rope, x)"), torch.randn(B, T, D), adapter=Open("blocks")).verified
    with pytest.raises(koopmon.DiscoveryError, match="is not the input of blocks"):
        koopmon.discover(made("block(rope, x)"), torch.randn(B, T, D), adapter=Exact("blocks"))


ADAPTER = Listed("blocks")


def reads(position: StatePosition, args: Any = (), kwargs: Any = None, output: Any = None) -> tuple[Any, Any]:
    stack = koopmon.Stack("blocks", (), position=position)
    module = nn.Identity()
    return block_input(ADAPTER, stack, module, args, kwargs or {}), block_output(ADAPTER, stack, module, output)


def test_a_path_that_is_absent_gives_none() -> None:
    x = torch.ones(2, 2)
    position = StatePosition((0, "x"), (1,))
    assert reads(position, ({"x": x},), output=(0, x)) == (x, x)
    assert reads(position, ({"y": x},), output=(0,)) == (None, None)
    assert reads(position, (), output=x) == (None, None)
    assert reads(position, ({"x": 3},), output=(0, None)) == (None, None)
    assert reads(StatePosition(("x",), ()), (), {"x": x}, x) == (x, x)


@pytest.mark.parametrize(
    ("output", "path"),
    [
        (torch.zeros(2, 2), ()),
        ((torch.ones(1), torch.zeros(2, 2)), (1,)),
        ([torch.ones(1), torch.zeros(2, 2)], (1,)),
        ({"a": 1, "x": torch.zeros(2, 2)}, ("x",)),
        (Streams(None, torch.zeros(2, 2)), ("x",)),
        (Carried(torch.ones(1), torch.zeros(2, 2)), (1,)),
        ((1, {"x": [torch.zeros(2, 2)]}), (1, "x", 0)),
    ],
)
def test_a_state_is_put_back_and_the_rest_stays(output: Any, path: Any) -> None:
    stack, module = koopmon.Stack("blocks", (), position=StatePosition((0,), path)), nn.Identity()
    new = torch.full((2, 2), 5.0)
    changed = with_block_output(ADAPTER, stack, module, output, new)
    assert type(changed) is type(output)
    assert block_output(ADAPTER, stack, module, changed) is new
    before = block_output(ADAPTER, stack, module, output)
    assert before is not None
    assert not before.any(), "the block's own output is not written to"


def test_a_container_that_cannot_be_rebuilt_is_named() -> None:
    stack = koopmon.Stack("blocks", (), position=StatePosition((0,), ("x",)))
    with pytest.raises(TypeError, match="OrderedDict"):
        with_block_output(ADAPTER, stack, nn.Identity(), OrderedDict(x=torch.zeros(2, 2)), torch.zeros(2, 2))


def test_only_tensors_that_may_be_states_are_looked_at_and_not_too_many() -> None:
    x = torch.zeros(2, 3)
    found = argument_tensors((x.long(), x[0], x[:0], x, [x, {"deep": x}]), {"y": x, "none": None})
    assert [path for path, _ in found] == [(3,), (4, 0), (4, 1, "deep"), ("y",)]
    assert len(output_tensors([x] * 100)) == 8
    assert output_tensors([[[[[[x]]]]]]) == []


def test_blocks_that_change_nothing_yet_are_read_by_the_adapter() -> None:
    """As in a diffusion transformer whose gates start at zero."""
    model = Model(lambda f, x, condition: x + 0 * f(x), second_argument_first)
    assert koopmon.discover(model, torch.randn(B, T, D), adapter=Listed("blocks")).stack.position is None


def second_argument_first(blocks: Any, x: Tensor, condition: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, condition)
    return x
