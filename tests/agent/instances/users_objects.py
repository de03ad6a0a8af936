"""K5: the user's objects stay the user's: copies, files, traces, transforms."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.agent.instances.battery import (
    Battery,
    Block,
    D,
    Net,
    V,
    Watch,
    loss_of,
    through,
    tokens,
    update,
    vectors,
)

battery = Battery()
case = battery.case


def amid(watch: Watch, act: Any, model: nn.Module | None = None) -> Iterator[Tensor | float]:
    """Train, yield what `act(model, optimizer)` returns after every second step, and train on."""
    model = model or Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    watch(model, optimizer)
    for step in range(10):
        yield update(loss_of(model, step), optimizer)
        if step % 2:
            model.zero_grad()
            value = act(model, optimizer)
            yield value.detach() if isinstance(value, Tensor) else value


def number(tensor: Any) -> float:
    return float(sum(each.double().sum() for each in torch.utils._pytree.tree_leaves(tensor)))


@case()
def whole_model_in_a_file(watch: Watch) -> Iterator[Any]:
    def act(model: nn.Module, optimizer: Any) -> float:
        file = io.BytesIO()
        torch.save({"model": model, "optimizer": optimizer}, file)
        assert b"koopmon" not in file.getvalue()
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert all(not each._forward_hooks and not each._forward_pre_hooks for each in loaded["model"].modules())
        loaded["optimizer"].step()
        return number(loaded["model"](tokens(1)))

    yield from amid(watch, act)


@case()
def optimizer_in_a_pickle_and_a_copy(watch: Watch) -> Iterator[Any]:
    def act(model: nn.Module, optimizer: Any) -> float:
        data = pickle.dumps(optimizer)
        assert b"koopmon" not in data
        again, copied = pickle.loads(data), copy.deepcopy(optimizer)
        assert not copied._optimizer_step_pre_hooks, "of a copy"
        assert not again._optimizer_step_pre_hooks, "of a pickle"
        copied.step()
        again.step()
        return number(copied.state_dict()["state"]) + len(optimizer.__getstate__())

    yield from amid(watch, act)


@case()
def average_by_deep_copy(watch: Watch) -> Iterator[Any]:
    averages: list[nn.Module] = []

    def act(model: nn.Module, optimizer: Any) -> Tensor:
        averages.append(copy.deepcopy(model))
        with torch.no_grad():
            for slow, fast in zip(averages[0].parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        return averages[0](tokens(3)).sum()

    yield from amid(watch, act)


@case()
def averaged_model_of_torch(watch: Watch) -> Iterator[Any]:
    kept: list[Any] = []

    def act(model: nn.Module, optimizer: Any) -> Tensor:
        if not kept:
            kept.append(torch.optim.swa_utils.AveragedModel(model, use_buffers=True))
        kept[0].update_parameters(model)
        return kept[0](tokens(3)).sum()

    yield from amid(watch, act)


@case()
def shallow_copy(watch: Watch) -> Iterator[Any]:
    def act(model: nn.Module, optimizer: Any) -> Tensor:
        return copy.copy(model)(tokens(3)).sum()

    yield from amid(watch, act)


@case()
def scripts_and_traces(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(model.blocks[0])
            traced = torch.jit.trace(model, tokens(0))
            frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(model.blocks[1]).eval()))
        return traced(tokens(1)).sum() + frozen(scripted(vectors(1))).sum()

    yield from amid(watch, act)


@case()
def exported(watch: Watch) -> Iterator[Any]:
    calls = [0]

    def act(model: Any, optimizer: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > 1:
            return model(tokens(1)).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (tokens(0),))
        assert "koopmon" not in str(program)
        return program.module()(tokens(1)).sum()

    yield from amid(watch, act)


@case()
def per_sample_gradients(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        parameters = dict(model.named_parameters())

        def loss(parameters: Any, sample: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (sample[None],)).square().mean()

        return number(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens(2)))

    yield from amid(watch, act)


@case()
def forward_and_second_derivatives(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        def f(x: Tensor) -> Tensor:
            return through(model.blocks, x).square().mean()

        x = vectors(5)
        _, along = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        _, back = torch.func.vjp(f, x)
        second = torch.func.hessian(lambda a: f(x * a))(torch.ones(2, 1, 1, 1)[0, 0, 0])
        jacobian = torch.autograd.functional.jacobian(f, x)
        return number([along, back(torch.ones(()))[0], second, jacobian])

    yield from amid(watch, act)


@case()
def ensemble_of_copies(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
        base = copy.deepcopy(model).to("meta")
        batch = tokens(1)
        return number(torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (batch,)))(parameters, buffers))

    yield from amid(watch, act)


@case()
def fake_and_meta(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True):
            shape = copy.deepcopy(model)(tokens(1)).shape
        with torch.device("meta"):
            other = Net()
        return float(
            sum(shape)
            + sum(copy.deepcopy(model).to("meta")(tokens(1).to("meta")).shape)
            + sum(other(tokens(1).to("meta")).shape)
        )

    yield from amid(watch, act)


@case()
def symbolic_traces(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = torch.fx.symbolic_trace(model.blocks[0])
        whole = make_fx(model)(tokens(1))
        assert "koopmon" not in graph.code + whole.code
        return number([graph(vectors(1)), whole(tokens(1))]) + len(graph.graph.nodes) + len(whole.graph.nodes)

    yield from amid(watch, act)


@case()
def parametrized_before(watch: Watch) -> Iterator[Any]:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.99

    model = Net()
    for block in model.blocks:
        parametrizations.weight_norm(block.up)
        parametrize.register_parametrization(block.down, "weight", Symmetric())

    def act(model: nn.Module, optimizer: Any) -> float:
        again = copy.deepcopy(model)
        return number(again(tokens(1))) + len(str(model))

    yield from amid(watch, act, model)


@case()
def tied_weights(watch: Watch) -> Iterator[Any]:
    model = Net()
    model.head.weight = model.embedding.weight

    def act(model: Any, optimizer: Any) -> float:
        again = copy.deepcopy(model)
        assert again.head.weight is again.embedding.weight
        assert pickle.loads(pickle.dumps(model)).head.weight.shape == (V, D)
        return len(list(again.parameters()))

    yield from amid(watch, act, model)


@case()
def hooks_of_the_state(watch: Watch) -> Iterator[Any]:
    model = Net()
    seen: list[str] = []
    model.blocks[0].register_state_dict_post_hook(lambda module, state, prefix, meta: seen.append(prefix))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append("load"))

    def act(model: Any, optimizer: Any) -> float:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        return number(model.state_dict()) + len(seen)

    yield from amid(watch, act, model)


@case()
def what_a_module_shows(watch: Watch) -> Iterator[Any]:
    """Its text, its attributes, its children and its class are as alone."""

    def act(model: Any, optimizer: Any) -> float:
        shown = [
            str(model),
            sorted(vars(model)),
            sorted(vars(model.blocks[0])),
            [name for name, _ in model.named_modules()],
        ]
        visited: list[str] = []
        model.apply(lambda module: visited.append(type(module).__name__))
        assert all(block.__class__ is Block and "forward" not in vars(block) for block in model.blocks)
        assert model.__class__ is Net
        assert "koopmon" not in str(shown)
        return float(len(str(shown)) + len(visited) + len(dir(model)))

    yield from amid(watch, act)


@case()
def hooks_of_the_user(watch: Watch) -> Iterator[Any]:
    """Features by hooks that come and go, and one that changes the output."""
    model = Net()
    kept: dict[int, Tensor] = {}
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: output * 0.99)

    def act(model: Any, optimizer: Any) -> float:
        handles = [
            block.register_forward_hook(lambda m, a, out, k=k: kept.__setitem__(k, out))
            for k, block in enumerate(model.blocks)
        ]
        model(tokens(1))
        for each in handles:
            each.remove()
        return number(list(kept.values()))

    yield from amid(watch, act, model)
    handle.remove()


@case()
def inference_mode(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> Tensor:
        model.eval()
        with torch.inference_mode():
            value = model(tokens(4)).sum()
        model.train()
        return value

    yield from amid(watch, act)


@case()
def pruned_and_quantised_copies(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        again = copy.deepcopy(model)
        for block in again.blocks:
            prune.l1_unstructured(block.up, "weight", 0.5)
            prune.remove(block.up, "weight")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(again, {nn.Linear}, torch.qint8)
        return number(again(tokens(1))) + number(quantised(tokens(1)))

    yield from amid(watch, act)


class Own(Block):
    """A block with its own ways to be copied and pickled."""

    def __deepcopy__(self, memo: Any) -> Own:
        other = Own()
        other.load_state_dict(self.state_dict())
        return other

    def __getstate__(self) -> Any:
        state = dict(self.__dict__)
        state["cache"] = None
        return state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        assert self.cache is None


@case()
def blocks_with_copies_of_their_own(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        data = pickle.dumps(model)
        assert b"koopmon" not in data
        return number(
            [copy.deepcopy(model)(tokens(1)), pickle.loads(data)(tokens(1)), copy.copy(model.blocks[0])(vectors(1))]
        )

    yield from amid(watch, act, Net(kind=Own))


@case()
def cloudpickle(watch: Watch) -> Iterator[Any]:
    tool = __import__("pytest").importorskip("cloudpickle")

    def act(model: Any, optimizer: Any) -> float:
        data = tool.dumps((model, optimizer))
        assert b"koopmon" not in data
        again, _ = pickle.loads(data)
        return number(again(tokens(1)))

    yield from amid(watch, act)


@case()
def arguments_of_spawned_processes(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        data = bytes(ForkingPickler.dumps(model.state_dict)) + bytes(ForkingPickler.dumps((model, [model.blocks])))
        assert b"koopmon" not in data
        return 0.0

    yield from amid(watch, act)


@case()
def joblib(watch: Watch) -> Iterator[Any]:
    tool = __import__("pytest").importorskip("joblib")

    def act(model: Any, optimizer: Any) -> float:
        file = io.BytesIO()
        tool.dump(model, file)
        assert b"koopmon" not in file.getvalue()
        return float(len(tool.hash(model)))

    yield from amid(watch, act)


@case()
def lists_of_blocks_in_files_and_copies(watch: Watch) -> Iterator[Any]:
    """Not the model but its parts, and a dict of parts."""

    def act(model: Any, optimizer: Any) -> float:
        data = pickle.dumps({"encoder": model.blocks, "first": [model.blocks[0]]}, protocol=2)
        assert b"koopmon" not in data
        clones = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(3))
        assert all(not each._forward_hooks for each in clones)
        return number(through(clones, vectors(1)))

    yield from amid(watch, act)


@case()
def hash_of_the_pickle(watch: Watch) -> Iterator[Any]:
    """A cache key from the bytes of a pickle is that of the unwatched model."""

    def act(model: Any, optimizer: Any) -> float:
        data = pickle.dumps(model)
        return float(len(data)) + float(sum(data) % 1000003) * 0

    yield from amid(watch, act)


@case()
def flops_and_profile(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            model(tokens(1)).sum().backward()
        model.zero_grad()
        with torch.profiler.profile():
            model(tokens(1))
        return float(counter.get_total_flops())

    yield from amid(watch, act)


@case()
def gradient_penalty(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> Tensor:
        x = vectors(3).requires_grad_()
        (grad,) = torch.autograd.grad(through(model.blocks, x).sum(), x, create_graph=True)
        loss = (grad.norm(dim=-1) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    yield from amid(watch, act)


@case()
def compiled_copy(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.compile(copy.deepcopy(model), backend="eager")(tokens(1)).sum()

    yield from amid(watch, act)


@case()
def unwrapped_by_accelerate(watch: Watch) -> Iterator[Any]:
    tool = __import__("pytest").importorskip("accelerate.utils")

    def act(model: Any, optimizer: Any) -> float:
        inner = tool.extract_model_from_parallel(model, keep_fp32_wrapper=False)
        assert inner is model
        return number(tool.clean_state_dict_for_safetensors(inner.state_dict()))

    yield from amid(watch, act)


@case()
def moved_between_types(watch: Watch) -> Iterator[Any]:
    def act(model: Any, optimizer: Any) -> float:
        model.double()
        value = number(model(tokens(1)))
        model.float().requires_grad_(True)
        return value

    yield from amid(watch, act)


@case()
def seeded_twin(watch: Watch) -> Iterator[Any]:
    """The state of every generator is that of the run alone."""

    def act(model: Any, optimizer: Any) -> float:
        import random

        import numpy as np

        return float(torch.rand(())) + float(hash(str(random.getstate())) * 0) + float(np.random.get_state()[2] * 0)

    yield from amid(watch, act)
