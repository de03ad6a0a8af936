"""Loops that are interrupted, entered again, or run beside other work of the process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import itertools
import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from tests.agent.instances.battery import (
    Battery,
    Net,
    Watch,
    loss_of,
    sgd,
    through,
    tokens,
    train,
    update,
)

battery, forks = Battery(), Battery()


class Interruption(BaseException):
    """An exception that no `except Exception` catches, such as KeyboardInterrupt."""


def interrupted(
    watch: Watch, when: str, error: BaseException, steps: int = 12, optimizer: Any = None
) -> Iterator[Tensor | float]:
    """Train with an error in every third step, at the place `when`; the loop catches it and goes on."""
    model = Net()
    optimizer = optimizer or sgd(model)
    watch(model, optimizer)
    armed = [False]

    def strike(*_: Any) -> None:
        if armed[0]:
            armed[0] = False
            raise error

    match when:
        case "before the forward":
            model.register_forward_pre_hook(strike)
        case "inside the forward":
            model.blocks[2].register_forward_hook(strike)
        case "after the forward":
            model.register_forward_hook(strike)
        case "inside the backward":
            model.blocks[1].register_full_backward_hook(strike)
        case "at a parameter":
            model.blocks[1].up.weight.register_post_accumulate_grad_hook(strike)
        case "before the step":
            optimizer.register_step_pre_hook(strike)
        case "after the step":
            optimizer.register_step_post_hook(strike)
    for step in range(steps):
        armed[0] = step % 3 == 2
        try:
            yield update(loss_of(model, step), optimizer)
        except type(error):
            yield -1.0


PLACES = (
    "before the forward",
    "inside the forward",
    "after the forward",
    "inside the backward",
    "at a parameter",
    "before the step",
    "after the step",
)
for place in PLACES:
    for error in (KeyboardInterrupt(), RuntimeError("out of memory"), Interruption()):

        def script(watch: Watch, place: str = place, error: BaseException = error) -> Iterator[Tensor | float]:
            yield from interrupted(watch, place, error)

        script.__name__ = f"{type(error).__name__}_{place}".replace(" ", "_")
        battery.case()(script)


@battery.case()
def a_batch_that_is_halved_after_an_error(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    limit = [4]

    def too_large(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > limit[0]:
            raise RuntimeError("out of memory")

    model.blocks[3].register_forward_pre_hook(too_large)
    for step in range(10):
        limit[0] = 2 if step % 2 else 4
        optimizer.zero_grad()
        batch, parts = tokens(step), 1
        while True:
            try:
                for part in batch.chunk(parts):
                    loss = nn.functional.cross_entropy(model(part).flatten(0, 1), part.flatten()) / parts
                    loss.backward()
                break
            except RuntimeError:
                optimizer.zero_grad()
                parts *= 2
        optimizer.step()
        yield loss.detach()


@battery.case()
def a_signal_handler_that_saves_and_raises(watch: Watch) -> Iterator[Tensor | float]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    saved: list[Any] = []

    def on_signal(*_: Any) -> None:
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        saved.append(len(file.getvalue()))
        raise Interruption

    before = signal.signal(signal.SIGUSR1, on_signal)
    places = itertools.cycle([model.blocks[1], model.head, model])
    try:
        for step in range(12):
            handle = None
            if step % 2:
                handle = next(places).register_forward_hook(lambda *_: signal.raise_signal(signal.SIGUSR1))
            try:
                yield update(loss_of(model, step), optimizer)
            except Interruption:
                yield float(saved[-1])
            if handle is not None:
                handle.remove()
    finally:
        signal.signal(signal.SIGUSR1, before)


@battery.case()
def a_timer_that_validates_in_a_signal_handler(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)

    def on_signal(*_: Any) -> None:
        with torch.no_grad():
            model(tokens(99))

    before = signal.signal(signal.SIGUSR2, on_signal)
    optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGUSR2))
    model.blocks[0].register_full_backward_hook(lambda *_: signal.raise_signal(signal.SIGUSR2))
    depth = [0]

    def guarded(*_: Any) -> None:
        if not depth[0]:
            depth[0] += 1
            on_signal()
            depth[0] -= 1

    signal.signal(signal.SIGUSR2, guarded)
    try:
        for step in range(8):
            yield update(loss_of(model, step), optimizer)
    finally:
        signal.signal(signal.SIGUSR2, before)


@battery.case()
def a_coroutine_that_waits_within_the_step(watch: Watch) -> Iterator[Tensor]:
    async def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        loss = loss_of(model, step)
        await asyncio.sleep(0)
        optimizer.zero_grad()
        loss.backward()
        await asyncio.sleep(0)
        optimizer.step()
        return loss.detach()

    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield asyncio.run(step_of(model, optimizer, step))


@battery.case()
def a_generator_that_holds_the_loop(watch: Watch) -> Iterator[Tensor]:
    def loop() -> Iterator[Tensor]:
        for step in itertools.count():
            yield update(loss_of(model, step), optimizer)

    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for _ in range(2):
        running = loop()
        for _ in range(4):
            yield next(running)
        running.close()


@battery.case()
def a_forward_within_the_forward(watch: Watch) -> Iterator[Tensor]:
    """The model reads its own prediction first."""

    class Twice(Net):
        def forward(self, batch: Tensor, again: bool = True) -> Tensor:
            if again:
                with torch.no_grad():
                    batch = self(batch, again=False).argmax(-1)
            return super().forward(batch)

    yield from train(watch, Twice())


@battery.case()
def a_forward_with_gradients_within_the_forward(watch: Watch) -> Iterator[Tensor]:
    class Twice(Net):
        def forward(self, batch: Tensor, again: bool = True) -> Tensor:
            out = super().forward(batch)
            return out + 0.1 * self(batch, again=False) if again else out

    yield from train(watch, Twice())


def validated(
    watch: Watch, model: nn.Module, validate: Callable[[], Any], step_loss: Callable[[int], Tensor]
) -> Iterator[Tensor]:
    """Train while another thread calls `validate` without gradients, again and again, at least once per step."""
    optimizer = sgd(model)
    watch(model, optimizer)
    ends, calls = threading.Event(), threading.Semaphore(0)

    def run() -> None:
        with torch.no_grad():
            while not ends.is_set():
                validate()
                calls.release()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for step in range(12):
            calls.acquire()
            yield update(step_loss(step), optimizer)
    finally:
        ends.set()
        thread.join()


@battery.case()
def a_thread_that_validates_meanwhile(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    yield from validated(watch, model, lambda: model(tokens(7)), lambda step: loss_of(model, step))


@battery.case()
def a_thread_that_validates_in_eval_mode_what_is_trained_in_it(watch: Watch) -> Iterator[Tensor]:
    model = Net().eval()
    yield from validated(watch, model, lambda: model(tokens(7)), lambda step: loss_of(model, step))


@battery.case()
def a_thread_that_validates_while_the_loop_calls_the_parts(watch: Watch) -> Iterator[Tensor]:
    """Neither thread calls the model itself."""
    model = Net()

    def parts(step: int) -> Tensor:
        return model.head(through(model.blocks, model.embedding(tokens(step)))).square().mean()

    yield from validated(watch, model, lambda: parts(7), parts)


@battery.case()
def a_thread_that_validates_by_parts(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    yield from validated(
        watch, model, lambda: through(model.blocks, model.embedding(tokens(7))), lambda step: loss_of(model, step)
    )


@battery.case()
def a_validation_in_the_middle_of_the_model_at_each_training_forward(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    main, steps = threading.get_ident(), 12
    entered, trained = threading.Semaphore(0), threading.Semaphore(0)

    def hold(*_: Any) -> None:
        if threading.get_ident() != main:
            entered.release()
            trained.acquire()

    model.blocks[1].register_forward_pre_hook(hold)

    def validate() -> None:
        with torch.no_grad():
            for _ in range(steps):
                model(tokens(7))

    thread = threading.Thread(target=validate)
    thread.start()
    for step in range(steps):
        entered.acquire()
        yield update(loss_of(model, step), optimizer)
        trained.release()
    thread.join()


@battery.case()
def forward_and_backward_in_threads_of_their_own(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for step in range(8):
            loss = first.submit(loss_of, model, step).result()
            second.submit(loss.backward).result()
            first.submit(optimizer.step).result()
            optimizer.zero_grad()
            yield loss.detach()


@battery.case()
def two_models_in_two_threads(watch: Watch) -> Iterator[Tensor | float]:
    first, second = Net(), Net(count=3)
    optimizers = sgd(first), sgd(second)
    watch(first, optimizers[0])
    losses: dict[int, list[float]] = {0: [], 1: []}

    def loop(index: int, model: nn.Module) -> None:
        for step in range(10):
            losses[index].append(float(update(loss_of(model, step), optimizers[index])))

    threads = [threading.Thread(target=loop, args=each) for each in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield sum(losses[0])
    yield sum(losses[1])


@battery.case()
def the_agent_is_attached_in_each_epoch(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    for epoch in range(4):
        watch(model, optimizer)
        for step in range(3):
            yield update(loss_of(model, 3 * epoch + step), optimizer)


@battery.case()
def the_agent_is_closed_and_attached_in_each_epoch(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    for epoch in range(3):
        agent = watch(model, optimizer)
        for step in range(4):
            yield update(loss_of(model, 4 * epoch + step), optimizer)
        if agent is not None and epoch < 2:
            agent.close()


def register(place: str, model: Any, optimizer: Any, hook: Callable[..., None]) -> None:
    """Call `hook` from a hook of the user, at one place of a step."""
    match place:
        case "forward":
            model.blocks[1].register_forward_hook(hook)
        case "backward":
            model.blocks[1].register_full_backward_hook(hook)
        case "parameter":
            model.head.weight.register_post_accumulate_grad_hook(hook)
        case "step":
            optimizer.register_step_pre_hook(hook)
        case "step_end":
            optimizer.register_step_post_hook(hook)


def attached_within(watch: Watch, place: str) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    done: list[bool] = []

    def attach(*_: Any) -> None:
        if not done:
            done.append(True)
            watch(model, optimizer)

    register(place, model, optimizer, attach)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)


def closed_within(watch: Watch, place: str) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    agent = watch(model, optimizer)
    calls: list[bool] = []

    def close(*_: Any) -> None:
        calls.append(True)
        if len(calls) == 10 and agent is not None:
            agent.close()

    register(place, model, optimizer, close)
    for step in range(10):
        yield update(loss_of(model, step), optimizer)


for place in ("forward", "backward", "parameter", "step", "step_end"):

    def attaching(watch: Watch, place: str = place) -> Iterator[Tensor]:
        yield from attached_within(watch, place)

    def closing(watch: Watch, place: str = place) -> Iterator[Tensor]:
        yield from closed_within(watch, place)

    attaching.__name__, closing.__name__ = f"attached_within_the_{place}", f"closed_within_the_{place}"
    battery.case()(attaching)
    battery.case()(closing)


@forks.case()
def a_fork_within_the_forward(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)

    def fork(*_: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    model.blocks[2].register_forward_hook(fork)
    for step in range(6):
        yield update(loss_of(model, step), optimizer)


@forks.case()
def a_forked_child_that_trains_on_and_is_killed(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step == 3:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    for further in range(3):
                        update(loss_of(model, further), optimizer)
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(child, 0)


@battery.case()
def warnings_are_errors(watch: Watch) -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield from train(watch, Net())


@battery.case()
def a_profiler_and_a_tracer_of_python(watch: Watch) -> Iterator[Tensor]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    sys.setprofile(count)
    try:
        yield from train(watch, Net())
    finally:
        sys.setprofile(None)


@battery.case()
def collection_in_each_hook(watch: Watch) -> Iterator[Tensor]:
    def collect(*_: Any) -> None:
        gc.collect(0)

    model = Net()
    for block in model.blocks:
        block.register_forward_hook(collect)
    yield from train(watch, model)


@battery.case()
def anomalies_are_detected(watch: Watch) -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.set_detect_anomaly(True):
            yield from train(watch, Net())


@battery.case()
def saved_tensors_are_packed(watch: Watch) -> Iterator[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        yield from train(watch, Net())


@battery.case()
def saved_tensors_are_forbidden_outside(watch: Watch) -> Iterator[Tensor]:
    """`disable_saved_tensors_hooks` raises where somebody installs such hooks."""
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        yield from train(watch, Net())


@battery.case()
def a_default_device_and_precision(watch: Watch) -> Iterator[Tensor]:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            yield from train(watch, Net())
    finally:
        torch.set_default_dtype(torch.float32)


@battery.case()
def the_default_device_is_meta(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    torch.set_default_device("meta")
    try:
        for step in range(8):
            with torch.device("cpu"):
                batch = tokens(step)
            yield update(nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()), optimizer)
    finally:
        torch.set_default_device(None)


@battery.case()
def the_random_states_are_compared(watch: Watch) -> Iterator[float]:
    import random

    import numpy as np

    model = Net(run=lambda stack, x: nn.functional.dropout(through(stack, x), 0.1, training=True))
    optimizer = sgd(model)
    watch(model, optimizer)
    random.seed(0)
    np.random.seed(0)
    for step in range(8):
        loss = update(loss_of(model, step), optimizer)
        yield float(loss) + random.random() + float(np.random.rand()) + float(torch.get_rng_state().sum())


@battery.case()
def deterministic_algorithms(watch: Watch) -> Iterator[Tensor]:
    torch.use_deterministic_algorithms(True)
    try:
        yield from train(watch, Net())
    finally:
        torch.use_deterministic_algorithms(False)


@battery.case()
def inference_mode_around_the_validation_and_the_saves(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        model.eval()
        with torch.inference_mode():
            yield loss_of(model, 100 + step).clone()
            pickle.loads(pickle.dumps(model.state_dict()))
            copy.deepcopy(optimizer.state_dict())
        model.train()


@battery.case()
def weights_are_shared_with_other_processes(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(8):
        yield update(loss_of(model, step), optimizer)
        if step == 3:
            model.share_memory()


@contextlib.contextmanager
def a_log_that_raises(name: str) -> Iterator[None]:
    """A handler of the user that raises reaches every call of the log."""

    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("koopmon"):
                raise ValueError("no disk")

    handler = Raises()
    logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(handler)


@battery.case()
def the_log_raises(watch: Watch) -> Iterator[Tensor]:
    with a_log_that_raises(""):
        yield from train(watch, Net())


@battery.case()
def the_log_raises_where_something_is_told(watch: Watch) -> Iterator[Tensor]:
    model = Net()
    model.blocks[:2].requires_grad_(False)
    optimizer = sgd(model)
    watch(model, optimizer)
    with a_log_that_raises("koopmon"):
        for step in range(8):
            yield update(loss_of(model, step), optimizer)


@battery.case()
def standard_error_is_gone(watch: Watch) -> Iterator[Tensor]:
    before, sys.stderr = sys.stderr, None
    try:
        yield from train(watch, Net())
    finally:
        sys.stderr = before
