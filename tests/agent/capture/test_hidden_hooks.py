"""The user's objects with taps in them: saved, copied, scripted, traced, exported and transformed as without."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap

from koopmon.agent.capture.hidden_hooks import add_hook, add_pre_hook
from koopmon.agent.circuit_breaker import CircuitBreaker
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning", "ignore:.*torch.jit.*")
Attach = Callable[..., Any]
D, T = 8, 5
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}}


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1)
        x = x + weights @ self.value(x)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(D) for _ in range(3)]), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class OwnDeepcopy(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> OwnDeepcopy:
        twin = OwnDeepcopy.__new__(OwnDeepcopy)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


class OwnState(Net):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "extra": 1}


def inputs(step: int = 0) -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(step))


def made(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = model(inputs(step)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class Tapped:
    """An attached model that may have been trained for some steps, and its twin that was never attached."""

    def __init__(self, kind: type[Net], monitor: ScriptedMonitor, agents: Attach, steps: int) -> None:
        self.model, self.bare = made(kind), made(kind)
        self.optimizer, self.bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.1) for each in self._both())
        self.agent = agents(self.model, self.optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
        self.monitor = monitor
        self.steps = 0
        self.train(steps)

    def _both(self) -> tuple[Net, Net]:
        return self.model, self.bare

    def train(self, steps: int) -> None:
        for _ in range(steps):
            found = train_step(self.model, self.optimizer, self.steps)
            assert found == train_step(self.bare, self.bare_optimizer, self.steps)
            self.steps += 1

    def check(self) -> None:
        """Train on: the losses are equal, and snapshots arrive."""
        self.monitor.wait(lambda: self.agent.status()["connected"])
        before = len(self.monitor.shards)
        self.train(4)
        assert self.agent.status()["reason"] == ""
        assert self.agent.status()["errors"] == 0
        self.monitor.wait(lambda: len(self.monitor.shards) > before)


@pytest.fixture(params=[0, 3])
def tapped(request: pytest.FixtureRequest, monitor: ScriptedMonitor, agents: Attach) -> Callable[..., Tapped]:
    return lambda kind=Net: Tapped(kind, monitor, agents, request.param)


def hooks_of(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [item for module in model.modules() for name in names for item in getattr(module, name).items()]


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


class WithoutTensors(pickle.Pickler):
    def persistent_id(self, thing: Any) -> str | None:
        return "tensor" if isinstance(thing, Tensor) else None


def without_tensors(model: nn.Module, protocol: int) -> bytes:
    file = io.BytesIO()
    WithoutTensors(file, protocol).dump(model)
    return file.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", [Net, OwnState])
def test_a_pickle_is_byte_by_byte_that_of_a_model_without_koopmon(
    kind: type[Net], protocol: int, tapped: Callable[..., Tapped]
) -> None:
    case = tapped(kind)
    assert hooks_of(case.model)
    assert without_tensors(case.model, protocol) == without_tensors(case.bare, protocol)
    assert hooks_of(pickle.loads(pickle.dumps(case.model, protocol))) == []
    case.check()


def test_a_saved_model_loads_with_its_own_classes_alone(tapped: Callable[..., Tapped]) -> None:
    case = tapped()
    file = io.BytesIO(saved(case.model))
    own = [Net, Block, nn.ModuleList, nn.Linear, nn.Sequential, nn.GELU]
    with torch.serialization.safe_globals(own):
        loaded = torch.load(file, weights_only=True)
    assert hooks_of(loaded) == []
    assert torch.equal(loaded(inputs()), case.bare(inputs()))
    case.check()


@pytest.mark.process
def test_a_saved_model_loads_where_koopmon_is_absent(
    tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    breaker = CircuitBreaker("a part")
    for module in model.modules():
        add_pre_hook(module, breaker.hook(lambda *args: None))
        add_hook(module, breaker.hook(lambda *args: None), with_kwargs=True)
    torch.save(model, tmp_path / "model.pt")
    python(
        "import sys, torch\nsys.modules['koopmon'] = None\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "assert not any(module._forward_hooks for module in model.modules())\n"
        "model(torch.randn(1, 3, 8))",
        tmp_path / "model.pt",
    )


@pytest.mark.parametrize("kind", [Net, OwnDeepcopy, OwnState])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_by_itself(
    kind: type[Net], duplicate: Callable[[Any], Any], tapped: Callable[..., Tapped]
) -> None:
    case = tapped(kind)
    twin, bare_twin = duplicate(case.model), duplicate(case.bare)
    received = case.agent.status()["step"]
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (twin, bare_twin))
    for step in range(3):
        assert train_step(twin, optimizer, step) == train_step(bare_twin, bare_optimizer, step)
    assert case.agent.status()["step"] == received
    case.check()


def test_a_part_of_the_model_copies_without_hooks(tapped: Callable[..., Tapped]) -> None:
    case = tapped()
    for part in (case.model.blocks, case.model.blocks[0], list(case.model.blocks)):
        twin = copy.deepcopy(part)
        assert not any(hooks_of(each) for each in (twin if isinstance(twin, list) else [twin]))
        assert b"koopmon" not in saved(part)
    case.check()


def test_hooks_of_the_user_stay_in_copies_and_files(tapped: Callable[..., Tapped]) -> None:
    case = tapped()
    block = case.model.blocks[1]
    before = block.register_forward_pre_hook(print_nothing)
    after = block.register_forward_hook(print_nothing, with_kwargs=True)
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        found = twin.blocks[1]
        assert (type(found._forward_hooks), list(found._forward_hooks)) == (OrderedDict, [after.id])
        assert list(found._forward_pre_hooks) == [before.id]
        assert list(found._forward_hooks_with_kwargs) == [after.id]
        assert not found._forward_pre_hooks_with_kwargs
    before.remove()
    after.remove()
    case.check()


def print_nothing(*args: Any) -> None:
    return None


def test_a_reducer_of_the_user_stays(monitor: ScriptedMonitor, agents: Attach) -> None:
    class Own(Net):
        pass

    copyreg.pickle(Own, lambda model: (print_nothing, ()))
    case = Tapped(Own, monitor, agents, 2)
    assert copy.deepcopy(case.model) is None
    case.check()


def scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def scripted_part(model: nn.Module) -> Any:
    blocks = torch.jit.script(nn.Sequential(*model.blocks))
    return nn.Sequential(blocks, model.head)


def scripted_in_eval(model: nn.Module) -> Any:
    frozen = torch.jit.freeze(torch.jit.script(model.eval()))
    model.train()
    return frozen


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, inputs())


def traced_without_gradients(model: nn.Module) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, inputs())


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (inputs(),)).module()


def exported_strictly(model: nn.Module) -> Any:
    return torch.export.export(model, (inputs(),), strict=True).module()


def fx_traced(model: nn.Module) -> Any:
    return torch.fx.symbolic_trace(model)


@pytest.mark.parametrize(
    "export",
    [
        scripted,
        scripted_part,
        scripted_in_eval,
        traced,
        traced_without_gradients,
        exported,
        exported_strictly,
        fx_traced,
    ],
)
def test_an_exported_program_is_that_of_a_model_without_koopmon(
    export: Callable[[nn.Module], Any], tapped: Callable[..., Tapped]
) -> None:
    case = tapped()
    program, bare = export(case.model), export(case.bare)
    if isinstance(program, torch.jit.ScriptModule):
        graphs = [re.sub(r"\d+", "", str(each.inlined_graph)) for each in (program, bare)]
        assert graphs[0] == graphs[1]
        file = io.BytesIO()
        torch.jit.save(program, file)
        assert b"koopmon" not in file.getvalue()
    elif isinstance(program, torch.fx.GraphModule):
        assert program.code == bare.code
    torch.testing.assert_close(program(inputs(7)), bare(inputs(7)), rtol=0.0, atol=0.0)
    case.check()


def per_sample(model: nn.Module) -> Any:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().mean()

    parameters = {name: each.detach() for name, each in model.named_parameters()}
    return vmap(grad(loss), (None, 0))(parameters, inputs())["head.weight"]


def ensemble(model: nn.Module) -> Any:
    stacked = {name: torch.stack([each, 2 * each]).detach() for name, each in model.named_parameters()}
    return vmap(lambda parameters, x: functional_call(model, parameters, (x,)), (0, None))(stacked, inputs())


def directional(model: nn.Module) -> Any:
    return jvp(model, (inputs(),), (torch.ones(2, T, D),))[1]


def with_swapped_parameters(model: nn.Module) -> Any:
    return functional_call(model, {name: each.detach() for name, each in model.named_parameters()}, (inputs(),))


def on_fake_tensors(model: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(inputs())).shape
    return torch.tensor(shape)


def on_fake_copies(model: nn.Module) -> Any:
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(each) for name, each in model.named_parameters()}
        x = mode.from_tensor(inputs())
    return torch.tensor(functional_call(model, fake, (x,)).shape)


def on_meta_tensors(model: nn.Module) -> Any:
    meta = {name: each.detach().to("meta") for name, each in model.named_parameters()}
    return torch.tensor(functional_call(model, meta, (inputs().to("meta"),)).shape)


@pytest.mark.parametrize(
    "run",
    [
        per_sample,
        ensemble,
        directional,
        with_swapped_parameters,
        on_fake_tensors,
        on_fake_copies,
        on_meta_tensors,
    ],
)
def test_a_foreign_forward_is_left_alone_and_disables_nothing(
    run: Callable[[nn.Module], Any], tapped: Callable[..., Tapped]
) -> None:
    case = tapped()
    for _ in range(4):
        assert torch.equal(run(case.model), run(case.bare))
    case.check()
    assert torch.equal(run(case.model), run(case.bare))
    case.check()
    assert case.agent.status()["taps_missing"] == 0
