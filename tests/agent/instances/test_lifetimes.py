"""Optimizers and models that come and go in one process, attached as `koopmon run` does it: K4."""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.optimizer_watch import ATTACHED_PID, OptimizerWatch
from koopmon.agent.training_steps import TrainingSteps
from tests.agent.instances.battery import Net, V, loss_of, sgd, tokens, update
from tests.agent.scripted_monitor import ScriptedMonitor

Script = Callable[[], Iterator[Tensor]]
CASES: list[tuple[Script, int]] = []


def case(trained: int) -> Callable[[Script], Script]:
    """Add a training in which `trained` models make updates under watch."""

    def add(script: Script) -> Script:
        CASES.append((script, trained))
        return script

    return add


def steps(model: nn.Module, optimizer: Any, count: int = 6, first: int = 0) -> Iterator[Tensor]:
    for step in range(first, first + count):
        yield update(loss_of(model, step), optimizer)


@case(1)
def a_new_optimizer_in_each_epoch() -> Iterator[Tensor]:
    model = Net()
    for epoch in range(4):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 / (1 + epoch))
        yield from steps(model, optimizer, 3)


@case(1)
def one_optimizer_per_parameter_in_the_backward_pass() -> Iterator[Tensor]:
    model = Net()
    optimizers = {each: torch.optim.SGD([each], lr=0.02, foreach=False) for each in model.parameters()}

    def hook(parameter: Any) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for each in model.parameters():
        each.register_post_accumulate_grad_hook(hook)
    for step in range(6):
        loss = loss_of(model, step)
        loss.backward()
        yield loss


@case(1)
def two_optimizers_in_alternating_steps() -> Iterator[Tensor]:
    model = Net()
    first, second = sgd(model.embedding, model.blocks[:2]), torch.optim.Adam(model.blocks[2:].parameters())
    for step in range(10):
        yield update(loss_of(model, step), first if step % 2 else second)


@case(1)
def an_optimizer_in_a_closure_that_is_replaced() -> Iterator[Tensor]:
    model = Net()

    def make(rate: float) -> Callable[[int], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        return lambda step: update(loss_of(model, step), optimizer)

    train = make(1e-3)
    for step in range(12):
        if step == 6:
            train = make(1e-4)
        yield train(step)


@case(3)
def a_sweep_that_deletes_and_collects() -> Iterator[Tensor]:
    for rate in (0.01, 0.02, 0.03):
        model = Net()
        optimizer = sgd(model, lr=rate)
        yield from steps(model, optimizer)
        del model, optimizer
        gc.collect()


@case(3)
def a_sweep_that_keeps_all() -> Iterator[Tensor]:
    kept = []
    for rate in (0.01, 0.02, 0.03):
        kept.append((Net(), rate))
        optimizer = sgd(kept[-1][0], lr=rate)
        yield from steps(kept[-1][0], optimizer)


@case(3)
def folds_from_copies_of_one_start() -> Iterator[Tensor]:
    start = Net()
    for _ in range(3):
        model = copy.deepcopy(start)
        yield from steps(model, torch.optim.Adam(model.parameters()))


@case(1)
def a_model_in_a_thread() -> Iterator[Tensor]:
    losses: list[Tensor] = []

    def work() -> None:
        model = Net()
        losses.extend(steps(model, sgd(model)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    yield from losses


@case(1)
def a_trainer_that_holds_itself() -> Iterator[Tensor]:
    class Trainer:
        def __init__(self) -> None:
            self.model, self.me = Net(), self
            self.optimizer = sgd(self.model)

    trainer = Trainer()
    yield from steps(trainer.model, trainer.optimizer)


@case(1)
def another_class_of_optimizer_after_the_warm_up() -> Iterator[Tensor]:
    model = Net()
    warm = torch.optim.Adam(model.parameters(), lr=1e-3)
    yield from steps(model, warm, 4)
    main = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    yield from steps(model, main, 6, 4)


@case(1)
def a_state_that_is_loaded_into_a_new_optimizer() -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    yield from steps(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(state)
    yield from steps(model, optimizer, 4, 4)


@case(3)
def a_population_in_turn() -> Iterator[Tensor]:
    models = [Net() for _ in range(3)]
    optimizers = [sgd(model, lr=0.01 * (1 + index)) for index, model in enumerate(models)]
    for turn in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            yield from steps(model, optimizer, 3, turn)
        models[0].load_state_dict(models[1].state_dict())


@case(1)
def a_finder_of_the_rate_before_the_training() -> Iterator[Tensor]:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    trial = torch.optim.SGD(model.parameters(), lr=1e-5)
    for step in range(5):
        trial.param_groups[0]["lr"] *= 3
        yield from steps(model, trial, 1, step)
    model.load_state_dict(state)
    yield from steps(model, sgd(model), 6)


@case(1)
def a_loss_with_weights_of_its_own() -> Iterator[Tensor]:
    """As a margin loss: its classes are weights beside the model, under the same optimizer."""
    model, classes = Net(), nn.Parameter(torch.randn(V, V))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [classes], "lr": 0.1}], lr=0.02)
    for step in range(10):
        batch = tokens(step)
        logits = model(batch).flatten(0, 1) @ classes
        yield update(nn.functional.cross_entropy(logits, batch.flatten()), optimizer)


@case(1)
def weights_of_tasks_beside_the_model() -> Iterator[Tensor]:
    model, scales = Net(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([*model.parameters(), scales])
    for step in range(10):
        yield update((loss_of(model, step) * torch.exp(-scales) + scales).sum(), optimizer)


class Decoder(Net):
    """Takes the logits of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(V, self.head.in_features)


@case(1)
def an_encoder_and_a_decoder_that_no_module_holds() -> Iterator[Tensor]:
    encoder, decoder = Net(), Decoder()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    for step in range(10):
        batch = tokens(step)
        logits = decoder(encoder(batch))
        yield update(nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()), optimizer)


@case(1)
def two_towers_with_rates_of_their_own() -> Iterator[Tensor]:
    left, right = Net(), Net()
    groups = [{"params": each.parameters(), "lr": rate} for each, rate in ((left, 1e-3), (right, 2e-3))]
    optimizer = torch.optim.AdamW(groups)
    for step in range(10):
        one, other = left(tokens(step)).mean(1), right(tokens(step + 50)).mean(1)
        yield update(nn.functional.cross_entropy(one @ other.T, torch.arange(len(one))), optimizer)


@case(1)
def an_encoder_and_a_decoder_under_a_new_optimizer_in_each_epoch() -> Iterator[Tensor]:
    encoder, decoder = Net(), Decoder()
    decoder.head.weight = encoder.embedding.weight  # tied
    for epoch in range(3):
        optimizer = torch.optim.SGD(list({*encoder.parameters(), *decoder.parameters()}), lr=0.01)
        for step in range(4):
            batch = tokens(4 * epoch + step)
            logits = decoder(encoder(batch))
            yield update(nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()), optimizer)


@case(1)
def a_small_model_with_a_large_classifier_beside_it() -> Iterator[Tensor]:
    model, classifier = Net(), nn.Linear(V, 500)
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()])
    for step in range(10):
        batch = tokens(step)
        logits = classifier(model(batch))
        yield update(nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten()), optimizer)


@case(1)
def a_large_and_a_small_model_under_one_optimizer() -> Iterator[Tensor]:
    """As a denoiser and its text encoder."""
    large, small = Net(count=6), Net(count=2)
    optimizer = torch.optim.AdamW([*large.parameters(), *small.parameters()])
    for step in range(10):
        logits = large(tokens(step)) + small(tokens(step))
        yield update(nn.functional.cross_entropy(logits.flatten(0, 1), tokens(step).flatten()), optimizer)


@case(1)
def two_models_under_one_optimizer_and_then_one_of_them() -> Iterator[Tensor]:
    encoder, decoder = Net(), Decoder()
    optimizer: torch.optim.Optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    for step in range(12):
        if step == 6:
            encoder.requires_grad_(False)
            optimizer = torch.optim.Adam(decoder.parameters())
        logits = decoder(encoder(tokens(step)))
        yield update(nn.functional.cross_entropy(logits.flatten(0, 1), tokens(step).flatten()), optimizer)


@case(2)
def a_larger_model_that_takes_the_blocks_of_a_smaller_one() -> Iterator[Tensor]:
    small = Net()
    yield from steps(small, sgd(small), 8)
    large = Net(count=2)
    large.embedding, large.blocks, large.head = (
        small.embedding,
        nn.ModuleList([*small.blocks, *large.blocks]),
        small.head,
    )
    del small
    yield from steps(large, sgd(large), 8, 8)


@case(2)
def a_teacher_and_then_its_student() -> Iterator[Tensor]:
    teacher, student = Net(count=6), Net(count=3)
    yield from steps(teacher, torch.optim.Adam(teacher.parameters()), 8)
    teacher.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters())
    for step in range(8):
        batch = tokens(step)
        with torch.no_grad():
            goal = teacher(batch).softmax(-1)
        yield update(nn.functional.cross_entropy(student(batch).transpose(1, 2), goal.transpose(1, 2)), optimizer)


@case(3)
def members_of_an_ensemble_in_each_step() -> Iterator[Tensor]:
    members = [Net() for _ in range(3)]
    optimizers = [torch.optim.Adam(each.parameters()) for each in members]
    for step in range(12):
        for member, optimizer in zip(members, optimizers, strict=True):
            yield update(loss_of(member, step), optimizer)


@case(2)
def a_model_that_is_made_again_after_a_loss_that_is_not_finite() -> Iterator[Tensor]:
    model = Net()
    optimizer = sgd(model)
    for step in range(12):
        if step == 6:
            saved = copy.deepcopy(model.state_dict())
            model = Net()
            model.load_state_dict(saved)
            optimizer = sgd(model, lr=0.001)
        yield update(loss_of(model, step), optimizer)


@case(1)
def an_average_that_is_made_again_in_each_epoch() -> Iterator[Tensor]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(3):
        average = copy.deepcopy(model).requires_grad_(False)
        for step in range(4):
            batch = tokens(4 * epoch + step)
            with torch.no_grad():
                goal = average(batch)
            yield update(loss_of(model, step) + 0.1 * (model(batch) - goal).square().mean(), optimizer)


@case(2)
def a_classifier_on_the_encoder_of_a_pretraining_that_is_kept() -> Iterator[Tensor]:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Net(count=3), Decoder()

        def forward(self, batch: Tensor) -> Tensor:
            return self.decoder(self.encoder(batch))

    class Classifier(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(V, 3)

        def forward(self, batch: Tensor) -> Tensor:
            return self.head(self.encoder(batch).mean(1))

    pretrained = Masked()
    yield from steps(pretrained, torch.optim.AdamW(pretrained.parameters()), 8)
    model = Classifier(pretrained.encoder)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(14):
        yield update(nn.functional.cross_entropy(model(tokens(step)), tokens(step).sum(1) % 3), optimizer)


@case(9)
def clients_of_a_federation_in_rounds() -> Iterator[Tensor]:
    """Copies of one model train in each round, and it gets their mean."""
    server = Net()
    for turn in range(3):
        states = []
        for client in range(3):
            model = copy.deepcopy(server)
            yield from steps(model, sgd(model), 4, 10 * turn + client)
            states.append(model.state_dict())
        server.load_state_dict({name: sum(each[name] for each in states) / 3 for name in states[0]})


@case(4)
def trials_that_are_pruned_by_an_exception() -> Iterator[Tensor]:
    class PrunedError(Exception):
        pass

    def objective(trial: int) -> Iterator[Tensor]:
        model = Net(count=2 + trial)
        optimizer = getattr(torch.optim, ("Adam", "SGD", "AdamW", "RMSprop")[trial])(model.parameters(), lr=1e-3)
        for step in range(8):
            if trial % 2 and step == 5:
                raise PrunedError
            yield from steps(model, optimizer, 1, step)

    kept = []
    for trial in range(4):
        try:
            yield from objective(trial)
        except PrunedError as error:
            kept.append(error)  # its traceback holds the model


@case(1)
def repeated_runs_on_one_model_that_is_reset() -> Iterator[Tensor]:
    model = Net()
    for seed in range(3):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        yield from steps(model, torch.optim.AdamW(model.parameters()), 5)


@case(1)
def one_optimizer_for_each_layer_with_a_schedule_of_its_own() -> Iterator[Tensor]:
    model = Net()
    parts = [model.embedding, *model.blocks, model.head]
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3, foreach=True) for each in parts]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.99) for each in optimizers]
    for step in range(10):
        loss = update(loss_of(model, step), *optimizers)
        for each in schedules:
            each.step()
        yield loss


@case(2)
def epochs_of_two_models_of_one_class_that_teach_each_other() -> Iterator[Tensor]:
    """Mutual learning: both train in each step, and each gets the logits of the other."""
    first, second = Net(), Net()
    one, other = torch.optim.Adam(first.parameters()), torch.optim.Adam(second.parameters())
    for step in range(10):
        batch = tokens(step)
        for model, peer, optimizer in ((first, second, one), (second, first, other)):
            goal = peer(batch).detach().softmax(-1)
            loss = loss_of(model, step) - (goal * model(batch).log_softmax(-1)).sum(-1).mean()
            yield update(loss, optimizer)


@case(1)
def an_estimator_that_is_fitted_in_parts() -> Iterator[Tensor]:
    """Each call of fit makes a new optimizer, and loads the state of the last one."""

    class Estimator:
        def __init__(self) -> None:
            self.module_, self.state_ = Net(), None

        def partial_fit(self, turn: int) -> Iterator[Tensor]:
            optimizer = torch.optim.SGD(self.module_.parameters(), lr=0.01, momentum=0.9)
            if self.state_ is not None:
                optimizer.load_state_dict(self.state_)
            yield from steps(self.module_, optimizer, 4, 4 * turn)
            self.state_ = optimizer.state_dict()

    estimator = Estimator()
    for turn in range(3):
        yield from estimator.partial_fit(turn)


@case(1)
def meta_steps_between_weights_before_and_after() -> Iterator[Tensor]:
    """Reptile: a new optimizer for each task, then a step by hand towards its weights."""
    model = Net()
    for task in range(4):
        before = copy.deepcopy(model.state_dict())
        yield from steps(model, torch.optim.SGD(model.parameters(), lr=0.02), 3, 3 * task)
        after = model.state_dict()
        model.load_state_dict({name: before[name] + 0.5 * (after[name] - before[name]) for name in before})


@case(3)
def boosting_of_members_on_the_residuals() -> Iterator[Tensor]:
    """Each member trains beside the frozen sum of those before."""
    members: list[nn.Module] = []
    for _ in range(3):
        model = Net(count=2)
        optimizer = sgd(model)
        for step in range(6):
            with torch.no_grad():
                logits = sum((each(tokens(step)) for each in members), torch.zeros(()))
            loss = nn.functional.cross_entropy((model(tokens(step)) + logits).flatten(0, 1), tokens(step).flatten())
            yield update(loss, optimizer)
        members.append(model.requires_grad_(False))


@case(1)
def an_optimizer_for_a_part_and_then_for_the_whole_in_each_cycle() -> Iterator[Tensor]:
    """The head alone, then everything, again and again, as the data of a new task comes."""
    model = Net()
    for cycle in range(2):
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        yield from steps(model, sgd(model.head), 3, cycle)
        model.requires_grad_(True)
        yield from steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 5, cycle)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("script", "trained"), CASES, ids=[script.__name__.replace("_", " ") for script, _ in CASES])
def test_every_model_that_trains_is_followed(
    script: Script,
    trained: int,
    monitor: ScriptedMonitor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    alone = [float(loss.detach()).hex() for loss in script()]
    gc.collect()
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_post_hooks", OrderedDict())
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", torch.optim.Optimizer.__init__)
    monkeypatch.setenv("KOOPMON_ENDPOINT", monitor.endpoint)
    monkeypatch.setenv("KOOPMON_RUN", "job")
    monkeypatch.setenv(ATTACHED_PID, str(os.getpid()))
    numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
    followed: Counter[int] = Counter()
    end_step = TrainingSteps._end_step

    def count(steps: TrainingSteps) -> None:
        end_step(steps)
        if (model := steps._model()) is not None:
            followed[numbers.setdefault(model, len(followed))] += 1

    monkeypatch.setattr(TrainingSteps, "_end_step", count)
    watch = OptimizerWatch()
    watch.wrap(sys.modules["torch.optim.optimizer"])
    try:
        torch.manual_seed(0)
        watched = [float(loss.detach()).hex() for loss in script()]
    finally:
        watch._enabled = False
        for each in list(watch._attached):
            watch._let_go(each)
    assert watched == alone
    assert len(followed) == trained
    assert followed.total() >= len(alone) - 2 * trained - 2, followed
    assert not [line for line in caplog.messages if "off" in line or "not attached" in line or "Error" in line]
