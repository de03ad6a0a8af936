"""Compilers, optimizers, wrappers and objects of users that behave unlike those of torch."""

from __future__ import annotations

import copy
import gc
import pickle
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.agent.instances.battery import (
    Battery,
    Block,
    D,
    Net,
    V,
    Watch,
    loss_of,
    sgd,
    through,
    tokens,
    train,
    update,
)

battery = Battery()

# Compilers


@battery.case()
def the_model_is_compiled_in_place(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.compile(backend="eager")
    yield from train(watch, model)


@battery.case()
def blocks_are_compiled_in_place_and_collected(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager")
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        gc.collect()


@battery.case(stack="_orig_mod.blocks")
def the_compiler_is_reset_in_each_epoch(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    watch(compiled, optimizer)
    for step in range(8):
        yield update(loss_of(compiled, step), optimizer)
        if step % 3 == 2:
            torch._dynamo.reset()
            gc.collect()


@battery.case()
def the_forward_method_is_compiled(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    yield from train(watch, model)


@battery.case()
def the_forward_of_each_block_is_compiled(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")  # type: ignore[method-assign]
    yield from train(watch, model)


@battery.case(stack="_orig_mod.blocks")
def one_graph_is_required(watch: Watch) -> Iterator[Tensor]:
    model = torch.compile(Net(), backend="eager", fullgraph=True)
    yield from train(watch, model)


@battery.case()
def one_graph_for_each_block_is_required(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    yield from train(watch, model)


@battery.case(stack="_orig_mod.blocks")
def shapes_are_dynamic(watch: Watch) -> Iterator[Tensor]:
    model = torch.compile(Net(), backend="eager", dynamic=True)
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(10):
        batch = tokens(step)[:, : 3 + step % 4]
        yield update(nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()), optimizer)


@battery.case(stack="_orig_mod.blocks")
def the_compiler_is_told_to_stand_aside(watch: Watch) -> Iterator[Tensor]:
    model = torch.compile(Net(), backend="eager")
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(9):
        with torch.compiler.set_stance("force_eager" if step % 3 == 2 else "default"):
            yield update(loss_of(model, step), optimizer)


@battery.case(stack="_orig_mod.blocks")
def a_block_is_left_out_of_the_graph(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)  # type: ignore[method-assign]
    yield from train(watch, torch.compile(model, backend="eager"))


@battery.case()
def the_loss_is_compiled_with_the_model(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)

    @torch.compile(backend="eager")
    def loss_by_graph(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    for step in range(8):
        yield update(loss_by_graph(tokens(step)), optimizer)


@battery.case(stack="_orig_mod.blocks")
def a_validation_is_compiled_too(watch: Watch) -> Iterator[Tensor]:
    model = torch.compile(Net(), backend="eager")
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        loss = update(loss_of(model, step), optimizer)
        model.eval()
        with torch.no_grad():
            loss = loss + loss_of(model, 50 + step)
        with torch.inference_mode():
            loss_of(model, 60 + step)
        model.train()
        yield loss


@battery.case(stack=None, told="no snapshots")
def checkpoints_in_a_graph(watch: Watch) -> Iterator[Tensor]:
    def run(stack: Any, x: Tensor) -> Tensor:
        for block in stack:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    yield from train(watch, torch.compile(Net(run), backend="eager"))


@battery.case(stack=None, told="no snapshots")
def two_compiled_models_of_one_class_in_turn(watch: Watch) -> Iterator[Tensor]:
    first, second = Net(), Net()
    compiled = torch.compile(first, backend="eager"), torch.compile(second, backend="eager")
    optimizers = sgd(first), sgd(second)
    watch(compiled[0], optimizers[0])
    for step in range(8):
        other = update(loss_of(compiled[1], step), optimizers[1])
        yield other + update(loss_of(compiled[0], step), optimizers[0])


@battery.case(stack="_orig_mod.blocks")
def a_graph_under_autocast(watch: Watch) -> Iterator[Tensor]:
    model = torch.compile(Net(), backend="eager")
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        yield update(loss, optimizer)


# Optimizers


@battery.case()
def gradients_that_overflow_are_skipped(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    watch(model, optimizer)
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        scaler.scale(loss * (float("inf") if step % 4 == 3 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        yield loss.detach() + scaler.get_scale()


@battery.case()
def batches_with_nan_are_left_out(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(12):
        loss = loss_of(model, step)
        if step % 4 == 2:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(loss):
            optimizer.step()
        yield torch.nan_to_num(loss.detach())


@battery.case()
def two_passes_for_each_update(watch: Watch) -> Iterator[Tensor]:
    """Sharpness-aware minimisation by hand."""
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        moves = [0.01 * each.grad for each in model.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), moves)
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        yield loss.detach()


@battery.case()
def a_closure_that_is_called_several_times(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    watch(model, optimizer)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    for step in range(6):
        yield optimizer.step(partial(closure, step)).detach()


@battery.case()
def a_step_that_is_patched_on_the_instance(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    step_before = optimizer.step

    def step_with_clip(self: Any, *args: Any, **kwargs: Any) -> Any:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return step_before(*args, **kwargs)

    optimizer.step = types.MethodType(step_with_clip, optimizer)  # type: ignore[method-assign]
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step == 3:
            optimizer.step = types.MethodType(step_with_clip, optimizer)  # type: ignore[method-assign]


@battery.case()
def groups_are_replaced_by_new_dicts(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step % 2:
            optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
            optimizer.state = copy.copy(optimizer.state)


@battery.case()
def the_state_of_the_optimizer_is_cleared(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step % 3 == 2:
            optimizer.state.clear()


@battery.case()
def the_optimizer_goes_through_a_pickle_in_each_step(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        model.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))


@battery.case()
def variants_of_the_update_change(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(9):
        optimizer.param_groups[0]["foreach"] = (None, True, False)[step % 3]
        optimizer.param_groups[0]["amsgrad"] = False
        optimizer.param_groups[0]["maximize"] = False
        yield update(loss_of(model, step), optimizer)


@battery.case()
def the_fused_update(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)


@battery.case()
def the_rate_is_a_tensor_that_changes_in_place(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    rate = torch.tensor(0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        rate.mul_(0.9)


@battery.case()
def gradients_are_written_by_hand(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    parameters = list(model.parameters())
    for step in range(8):
        loss = loss_of(model, step)
        with torch.no_grad():
            for each, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                each.grad = gradient.clone()
        optimizer.step()
        yield loss.detach()


@battery.case()
def a_microbatch_and_its_gradients_in_each_of_three_threads(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)

    def work(number: int) -> Tensor:
        loss = loss_of(model, number) / 3
        loss.backward()
        return loss.detach()

    for step in range(8):
        optimizer.zero_grad()
        losses = []
        for number in range(3):
            with ThreadPoolExecutor(1) as thread:
                losses.append(thread.submit(work, 3 * step + number).result())
        optimizer.step()
        yield torch.stack(losses).sum()


@battery.case(told="the optimizer trains 2 of 4 blocks")
def frozen_parts_join_as_groups(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.requires_grad_(False)
    model.blocks[2:].requires_grad_(True)
    optimizer = torch.optim.AdamW(model.blocks[2:].parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(12):
        if step == 4:
            model.blocks[:2].requires_grad_(True)
            optimizer.add_param_group({"params": list(model.blocks[:2].parameters()), "lr": 0.001})
        if step == 7:
            model.head.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.head.parameters())})
        yield update(loss_of(model, step), optimizer)


# Wrappers


@battery.case()
def the_model_is_wrapped_in_the_middle(watch: Watch) -> Iterator[Tensor]:
    model: nn.Module = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(12):
        yield update(loss_of(model, step), optimizer)
        if step == 3:
            model = nn.Sequential(model)
        if step == 7:
            model = nn.DataParallel(model)


@battery.case(stack="0.blocks")
def the_model_is_unwrapped_in_the_middle(watch: Watch) -> Iterator[Tensor]:
    inner = Net()
    model: nn.Module = nn.Sequential(inner, nn.Identity())
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(10):
        yield update(loss_of(model, step), optimizer)
        if step == 4:
            model = inner


@battery.case()
def chunks_of_blocks_are_checkpointed(watch: Watch) -> Iterator[Tensor]:
    def run(stack: Any, x: Tensor) -> Tensor:
        return checkpoint_sequential(nn.Sequential(*stack), 2, x, use_reentrant=False)

    yield from train(watch, Net(run))


@battery.case()
def checkpoints_of_both_kinds_in_turn(watch: Watch) -> Iterator[Tensor]:
    calls = [0]

    def run(stack: Any, x: Tensor) -> Tensor:
        calls[0] += 1
        for block in stack:
            x = checkpoint(block, x, use_reentrant=bool(calls[0] % 2))
        return x

    yield from train(watch, Net(run))


@battery.case()
def checkpoints_within_checkpoints(watch: Watch) -> Iterator[Tensor]:
    def run(stack: Any, x: Tensor) -> Tensor:
        def half(part: Any, x: Tensor) -> Tensor:
            for block in part:
                x = checkpoint(block, x, use_reentrant=False)
            return x

        for part in (stack[:2], stack[2:]):
            x = checkpoint(half, part, x, use_reentrant=False)
        return x

    yield from train(watch, Net(run))


@battery.case()
def the_tables_of_global_hooks_are_emptied(watch: Watch) -> Iterator[Tensor]:
    from torch.nn.modules import module

    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        module._global_forward_hooks.clear()
        module._global_forward_pre_hooks.clear()
        module._global_backward_hooks.clear()


@battery.case()
def the_call_of_modules_is_patched(watch: Watch) -> Iterator[Tensor]:
    before = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before(self, *args, **kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield from train(watch, Net())
    finally:
        nn.Module.__call__ = before  # type: ignore[method-assign]


@battery.case()
def the_backward_is_patched_in_the_middle(watch: Watch) -> Iterator[Tensor]:
    before = Tensor.backward
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    try:
        for step in range(8):
            if step == 3:
                Tensor.backward = lambda self, *args, **kwargs: before(self, *args, **kwargs)  # type: ignore[assignment, method-assign, misc]
            yield update(loss_of(model, step), optimizer)
    finally:
        Tensor.backward = before  # type: ignore[method-assign]


# Objects of the user


class Odd(Net):
    """A model that is false, has no length, equals everything, and shows nothing."""

    def __bool__(self) -> bool:
        raise RuntimeError("a model is neither true nor false")

    def __len__(self) -> int:
        return 0

    def __repr__(self) -> str:
        raise RuntimeError("nothing to show")

    def __iter__(self) -> Iterator[nn.Module]:
        raise TypeError("a model is no list")


@battery.case()
def a_model_without_truth_length_and_text(watch: Watch) -> Iterator[Tensor]:
    yield from train(watch, Odd())


@battery.case()
def a_model_that_equals_by_its_weights(watch: Watch) -> Iterator[Tensor]:
    class Equal(Net):
        def __eq__(self, other: object) -> Any:
            return self.head.weight == other.head.weight  # type: ignore[attr-defined]

        __hash__ = nn.Module.__hash__

    yield from train(watch, Equal())


@battery.case()
def a_model_with_a_hash_of_its_content(watch: Watch) -> Iterator[Tensor]:
    class Hashed(Net):
        def __hash__(self) -> int:
            return int(self.head.weight.sum() * 1e6) if hasattr(self, "head") else 0

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

    yield from train(watch, Hashed())


@battery.case()
def blocks_with_a_hash_of_their_content(watch: Watch) -> Iterator[Tensor]:
    class Hashed(Block):
        def __hash__(self) -> int:
            return int(self.up.weight.sum() * 1e6) if hasattr(self, "up") else 0

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self)

    yield from train(watch, Net(kind=Hashed))


@battery.case()
def blocks_that_are_false(watch: Watch) -> Iterator[Tensor]:
    class Empty(Block):
        def __len__(self) -> int:
            return 0

    yield from train(watch, Net(kind=Empty))


@battery.case()
def attributes_that_raise(watch: Watch) -> Iterator[Tensor]:
    class Raises(Net):
        @property
        def config(self) -> Any:
            raise KeyError("config")

        @property
        def device(self) -> Any:
            raise RuntimeError("device")

        @property
        def module(self) -> Any:
            raise OSError("module")

        @property
        def dtype(self) -> Any:
            raise ValueError("dtype")

    yield from train(watch, Raises())


@battery.case()
def a_model_that_is_its_own_module(watch: Watch) -> Iterator[Tensor]:
    class Own(Net):
        @property
        def module(self) -> nn.Module:
            return self

        @property
        def _orig_mod(self) -> nn.Module:
            return self

    yield from train(watch, Own())


@battery.case()
def blocks_that_are_their_own_module(watch: Watch) -> Iterator[Tensor]:
    class Own(Block):
        @property
        def module(self) -> nn.Module:
            return self

    yield from train(watch, Net(kind=Own))


@battery.case()
def attributes_of_every_name(watch: Watch) -> Iterator[Tensor]:
    """Like a mock: each unknown attribute exists."""

    class Anything(Net):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__"):
                    raise
                return 3

    yield from train(watch, Anything())


@battery.case()
def optimizers_without_truth_and_text(watch: Watch) -> Iterator[Tensor]:
    class OddSgd(torch.optim.SGD):
        def __bool__(self) -> bool:
            raise RuntimeError("neither true nor false")

        def __len__(self) -> int:
            return 0

        def __repr__(self) -> str:
            raise RuntimeError("nothing to show")

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = object.__hash__

    model = Net()
    optimizer = OddSgd(model.parameters(), lr=0.02)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)


@battery.case()
def a_name_with_escapes(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.add_module("a \x1b[2J\nb <script>", nn.Linear(D, D))
    type(model).__name__ = "Net"
    yield from train(watch, model)


@battery.case(stack="\x1b[2J b")
def a_stack_with_a_name_of_escapes(watch: Watch) -> Iterator[Tensor]:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
            self.add_module("\x1b[2J b", nn.ModuleList(Block() for _ in range(4)))

        def forward(self, batch: Tensor) -> Tensor:
            return self.head(through(self._modules["\x1b[2J b"], self.embedding(batch)))

    yield from train(watch, Named())


@battery.case()
def modules_with_slots_and_a_cycle(watch: Watch) -> Iterator[Tensor]:
    class Cyclic(Net):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["me"] = self
            self.blocks[0].__dict__["root"] = self

    yield from train(watch, Cyclic())


@battery.case()
def a_module_that_forbids_new_attributes(watch: Watch) -> Iterator[Tensor]:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["done"] = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("done"):
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    yield from train(watch, Frozen())


@battery.case()
def parameters_of_a_class_of_their_own(watch: Watch) -> Iterator[Tensor]:
    class Tagged(nn.Parameter):
        def __eq__(self, other: object) -> Any:
            raise RuntimeError("compare by identity")

        __hash__ = Tensor.__hash__

        def __bool__(self) -> bool:
            raise RuntimeError("no truth")

    model = Net()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, Tagged(parameter.data))
    yield from train(watch, model)


@battery.case()
def a_function_mode_of_the_user(watch: Watch) -> Iterator[Tensor | float]:
    from torch.overrides import TorchFunctionMode

    class Counts(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Counts():
        yield from train(watch, Net())


@battery.case()
def a_dispatch_mode_of_the_user(watch: Watch) -> Iterator[Tensor | float]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with Counts():
        yield from train(watch, Net())


@battery.case(told="the measurement of the loss is off")
def a_mode_that_forbids_reads_of_values(watch: Watch) -> Iterator[Tensor | float]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("no reads here")
            return function(*args, **(kwargs or {}))

    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        with NoReads():
            loss = update(loss_of(model, step), optimizer)
        yield loss
