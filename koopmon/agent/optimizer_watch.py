"""Attachment of the optimizers that a process makes, each to the model that it trains.

When the script makes an optimizer, the one root module that owns its parameters is looked up among the live objects.
`koopmon.attach` follows, before the first forward and on every rank alike. Further optimizers of that model join. A
model that trains beside the first one is a run of its own. An optimizer that is made after another model has trained
begins a further training: its model is followed at once, and in the run of the earlier model if that has the same
class. Every failure becomes one log line, and training goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from koopmon.agent.model_roots import (
    RootNotFoundError,
    contains,
    describe_model,
    goes_on_elsewhere,
    join,
    kind_of,
    models_of,
    owns,
    parameters_of,
    root_module,
)
from koopmon.errors import raise_from_signal
from koopmon.logs import announced, log_for_job
from koopmon.run_names import stack_run_name

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

TARGET = "torch.optim.optimizer"
ATTACHED_PID = "KOOPMON_ATTACHED_PID"
"""Variable with the id of the attached process, and " rank" if it is one of several ranks."""
MAX_MODELS = 4
"""Models of one process that are watched at a time."""
IDLE_STEPS = 10
"""First steps of an optimizer after which attached models that made no step meanwhile are let go."""
_log = logging.getLogger("koopmon.agent")


class _Agent(Protocol):
    def close(self) -> None: ...

    def status(self) -> dict[str, Any]: ...


@dataclass(slots=True, eq=False)
class _Attached:
    """One model, of the class `kind`, with its agent, its optimizers and the name of its run."""

    agent: _Agent
    kind: str
    run: str | None
    model: Callable[[], nn.Module | None]
    optimizers: weakref.WeakSet[Optimizer]

    @property
    def is_dead(self) -> bool:
        return self.model() is None or not self.optimizers

    @property
    def is_on(self) -> bool:
        return bool(self.agent.status().get("enabled", True))

    @property
    def num_steps(self) -> int:
        return int(self.agent.status().get("step", 0))

    def parameters(self) -> frozenset[int]:
        model = self.model()
        return frozenset() if model is None else frozenset(map(id, model.parameters()))


class OptimizerWatch:
    """Attaches koopmon to the optimizers that this process makes. It is also the import finder that waits for torch."""

    def __init__(self) -> None:
        self._enabled = True
        self._busy = False
        self._busy_thread = 0
        """The thread that attached last."""
        self._attached: list[_Attached] = []
        """The models that train, in the order of their attachment."""
        self._waiting: weakref.WeakKeyDictionary[Optimizer, Callable[[Optimizer], None]] = weakref.WeakKeyDictionary()
        """Optimizers whose steps decide on an attachment, each with the function to call after its step."""
        self._follows_steps = False
        self._roots: weakref.WeakKeyDictionary[Optimizer, nn.Module] = weakref.WeakKeyDictionary()
        """Modules made for several models of one optimizer. Nothing else holds them."""
        self._free_runs: list[tuple[str, str]] = []
        """Names of runs of models that were let go, each behind the class of its models, "" for any class."""
        self._num_named: Counter[str] = Counter()
        """Further models that were named, by their class."""
        self._logged: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find `torch.optim.optimizer`, once, for a loader that wraps its optimizers after their import."""
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # removes the instance attribute; the class's method applies again
            execute(module)
            self.wrap(module)

        loader.exec_module = exec_module
        return spec

    def on_fork(self) -> None:
        """Leave the child of an attached process alone, such as a DataLoader worker. Another one may be a rank."""
        self._enabled = self._enabled and not self._attached

    def wrap(self, module: ModuleType) -> None:
        try:
            optimizer_class = module.Optimizer
            original = optimizer_class.__init__

            @functools.wraps(original)
            def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
                original(optimizer, *args, **kwargs)
                self.on_optimizer_created(optimizer)

            optimizer_class.__init__ = init
            set_state = optimizer_class.__setstate__

            @functools.wraps(set_state)
            def setstate(optimizer: Optimizer, state: Any) -> None:
                set_state(optimizer, state)
                self.on_optimizer_created(optimizer, copied=True)

            optimizer_class.__setstate__ = setstate
        except Exception as error:
            self._log(f"not attached: {error}")

    def on_optimizer_created(self, optimizer: Optimizer, *, copied: bool = False) -> None:
        """Attach to a new optimizer, or let it join the attached model.

        One that is `copied`, or loaded with its model, is not complete yet. `load_state_dict` looks the same.
        """
        self._guarded(self._wait_for_copy if copied else self._attach, optimizer)

    def _wait_for_copy(self, optimizer: Optimizer) -> None:
        from koopmon.agent.control.scaled_view import is_view

        known = optimizer in self._waiting or any(optimizer in each.optimizers for each in self._attached)
        if not known and not is_view(optimizer):
            self._wait_for_steps(optimizer)

    def _guarded(self, action: Callable[[Optimizer], None], optimizer: Optimizer) -> None:
        if not self._enabled:
            return
        if self._busy:
            if self._busy_thread != threading.get_ident() and optimizer not in self._waiting:
                self._wait_for_steps(optimizer)  # another thread attaches, which may wait for the monitor
            return
        self._busy, self._busy_thread = True, threading.get_ident()
        try:
            action(optimizer)
        except BaseException as error:
            raise_from_signal(error)
            self._log(f"not attached, training goes on without koopmon: {type(error).__name__}: {error}")
        finally:
            self._busy = False

    def _attach(self, optimizer: Optimizer) -> None:
        self._let_go_of_dead()
        parameters = parameters_of(optimizer)
        owner = next((each for each in self._attached if parameters & each.parameters()), None)
        if owner is None or (model := owner.model()) is None:
            present = [each for each in self._attached if each.is_on]
            # Optimizers that are made before any training may belong to models that train in turn, or never.
            if not present or any(each.num_steps for each in present):
                # Without a root the model may be built later, and many optimizers never step.
                with contextlib.suppress(RootNotFoundError):
                    self._follow(root_module(optimizer), optimizer, replaces=True)
                    if not present:
                        return
            self._wait_for_steps(optimizer)
        elif owns(model, parameters):
            self._join(owner, model, optimizer)
        elif not owner.num_steps:
            self._regroup(root_module(optimizer), optimizer)
        elif goes_on_elsewhere(model, optimizer):
            self._wait_for_steps(optimizer)
        else:
            self._join(owner, model, optimizer)

    def _follow(self, root: nn.Module, optimizer: Optimizer, *, replaces: bool = False) -> None:
        """Attach to `root`. If it `replaces`, the first model of its class that has trained is let go before."""
        if any(contains(root, each.model()) for each in self._attached):
            self._regroup(root, optimizer)
            return
        kind = kind_of(root)
        before = next((each for each in self._attached if each.kind == kind and each.num_steps), None)
        if replaces and before is not None:
            self._let_go(before)
        if sum(each.is_on for each in self._attached) < MAX_MODELS:
            self._attach_to(root, optimizer)
        else:
            self._log(
                f"more than {MAX_MODELS} models train in this process: {describe_model(optimizer)} is not watched"
            )

    def _attach_to(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach to a model that is attached already, or to a further one, whose run has its class in its name."""
        from koopmon import attach

        owner = next((each for each in self._attached if each.model() is model), None)
        if owner is not None:
            self._join(owner, model, optimizer)
            return
        job, kind = os.environ.get("KOOPMON_RUN"), kind_of(model)
        run = self._run_of(job, kind) if job else None
        agent = attach(model, optimizer) if run == job else attach(model, optimizer, run=run)
        attached = _Attached(agent, kind, run, weakref.ref(model), weakref.WeakSet([optimizer]))
        if not attached.is_on:
            self._free_run(attached)
            attached.run = None
        elif self._attached and run != job:
            self._log(f"a further model trains: {kind} is run {run}", level=logging.INFO)
        self._attached.append(attached)
        os.environ[ATTACHED_PID] = f"{os.getpid()} rank" if announced()[1] > 1 else str(os.getpid())
        atexit.register(agent.close)

    def _join(self, owner: _Attached, model: nn.Module, optimizer: Optimizer) -> None:
        from koopmon import attach

        attach(model, optimizer)
        owner.optimizers.add(optimizer)
        if any(model is each for each in self._roots.values()):
            self._roots[optimizer] = model  # the optimizers before this one may not live as long

    def _run_of(self, job: str, kind: str) -> str:
        """Return the name of a run for a model of the class `kind`: equal on all ranks, whenever they free a model."""
        free = next((each for each in self._free_runs if each[0] in (kind, "")), None)
        if free is not None:
            self._free_runs.remove(free)
            return free[1]
        self._num_named[""] += 1
        if self._num_named[""] == 1:
            return job
        self._num_named[kind] += 1
        count = self._num_named[kind]
        return stack_run_name(job, kind if count == 1 else f"{kind}{count}")

    def _let_go(self, attached: _Attached) -> None:
        """Close the agent of a model that does not train now. If it trains again later, it is attached again."""
        self._attached.remove(attached)
        atexit.unregister(attached.agent.close)
        may_return = attached.is_on and attached.model() is not None
        self._free_run(attached)
        attached.agent.close()
        for optimizer in attached.optimizers if may_return else ():
            self._wait_for_return(optimizer)

    def _free_run(self, attached: _Attached) -> None:
        """Keep the name of a run for the next model of the class; the job's own name, if nothing trained, for any."""
        if attached.run is not None:
            is_unused = attached.run == os.environ.get("KOOPMON_RUN") and not attached.num_steps
            self._free_runs.append(("" if is_unused else attached.kind, attached.run))

    def _let_go_of_dead(self) -> None:
        for each in [each for each in self._attached if each.is_dead]:
            self._let_go(each)

    def _regroup(self, root: nn.Module, optimizer: Optimizer) -> None:
        """Attach to `root`, which holds attached models and that of `optimizer`."""
        parts = [each for each in self._attached if contains(root, each.model())]
        optimizers = [member for each in parts for member in each.optimizers]
        for each in parts:
            self._let_go(each)
        for member in (*optimizers, optimizer):
            self._waiting.pop(member, None)
            self._attach_to(root, member)

    def _wait_for_steps(self, optimizer: Optimizer) -> None:
        """Attach to `optimizer` once it trains, and let go of models that do not train any more.

        If no attached model has trained, it is unknown which one does. `optimizer` then waits for a step of another one
        or for several of its own.
        """
        steps: dict[_Attached, int] = {}
        """Steps of each attached model at the first step of `optimizer`."""
        num_steps = 0

        def after_step(stepping: Optimizer) -> None:
            nonlocal num_steps
            num_steps += 1
            self._let_go_of_dead()
            if num_steps == 1:
                steps.update({each: each.num_steps for each in self._attached})
            is_last = num_steps >= IDLE_STEPS
            if is_last:
                self._waiting.pop(stepping, None)
            own = next((each for each in self._attached if stepping in each.optimizers), None)
            idle = [each for each in self._attached if each is not own and steps.get(each) == each.num_steps]
            begins = is_last or all(not each.is_on or each.num_steps for each in self._attached)
            if own is None and (num_steps == 1 or begins):
                try:
                    root = self._root_of(stepping)
                except RootNotFoundError:  # it updates single parameters beside the model
                    self._waiting.pop(stepping, None)
                    if any(each.is_on for each in self._attached):
                        return
                    raise
                for each in idle if is_last else ():
                    self._let_go(each)
                if begins or any(contains(root, each.model()) for each in self._attached):
                    self._follow(root, stepping)
            elif own is not None and is_last and own.is_on:
                for each in idle:
                    self._let_go(each)

        self._waiting[optimizer] = after_step
        self._follow_steps()

    def _root_of(self, optimizer: Optimizer) -> nn.Module:
        """Return the model of an optimizer that steps: one made for its models if there are several.

        Raises RootNotFoundError when there is none.
        """
        with contextlib.suppress(RootNotFoundError):
            return root_module(optimizer)
        models = models_of(optimizer)
        if len(models) > 1:
            self._roots[optimizer] = join(models)
            return self._roots[optimizer]
        return models[0] if models else root_module(optimizer, most=True)

    def _wait_for_return(self, optimizer: Optimizer) -> None:
        """Attach to the model of `optimizer` again at its next step."""

        def after_step(stepping: Optimizer) -> None:
            self._waiting.pop(stepping, None)
            self._let_go_of_dead()
            parameters = parameters_of(stepping)
            owner = next((each for each in self._attached if parameters & each.parameters()), None)
            if owner is not None and (model := owner.model()) is not None:
                self._join(owner, model, stepping)
            else:
                self._follow(self._root_of(stepping), stepping)

        self._waiting[optimizer] = after_step
        self._follow_steps()

    def _follow_steps(self) -> None:
        """Register one hook for all optimizers.

        torch calls it after the hooks of the optimizer itself. An attachment changes those, which is an error while
        torch iterates over them.
        """
        if self._follows_steps:
            return
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        from koopmon.agent.control import new_optimizers

        new_optimizers.prepare()  # an attachment in the hook below could not

        def hook(stepping: Optimizer, *_: Any) -> None:
            if not torch.compiler.is_compiling() and (after_step := self._waiting.get(stepping)) is not None:
                self._guarded(after_step, stepping)

        register_optimizer_step_post_hook(hook)
        self._follows_steps = True

    def is_news(self, record: logging.LogRecord) -> bool:
        """Return False for a refusal that was logged before: a loop may make a model in each evaluation."""
        text = record.getMessage()
        if "not attached" not in text:
            return True
        is_news = text not in self._logged
        self._logged.add(text)
        return is_news

    def _log(self, text: str, level: int = logging.WARNING) -> None:
        if text not in self._logged:
            self._logged.add(text)
            log_for_job(_log, text, level=level)
