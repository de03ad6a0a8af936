"""`koopmon.attach`: the call that attaches the agent to a training."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from koopmon import config as configuration
from koopmon.agent.comms.monitor_start import wait_for_monitor
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.handle import Agent
from koopmon.agent.parallelism import refusal
from koopmon.agent.runtime import AgentRuntime
from koopmon.config import Config
from koopmon.errors import KoopmonError, raise_from_signal
from koopmon.logs import log_for_job
from koopmon.plugins import Selection, select
from koopmon.run_names import check_run_name
from koopmon.wire.auth_policy import make_auth_policy
from koopmon.wire.endpoints import check_endpoint

__all__ = ["Agent", "attach"]

logger = logging.getLogger("koopmon.agent")
_runtimes: weakref.WeakKeyDictionary[nn.Module | Optimizer, weakref.ref[AgentRuntime]] = weakref.WeakKeyDictionary()
T = TypeVar("T")


class _NotAttachedError(Exception):
    """An obstacle that the arguments did not cause keeps the agent off. The message names the remedy."""


def attach(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    endpoint: str | None = None,
    run: str | None = None,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Agent:
    """Attach koopmon to a training.

    Call it once, on every rank alike, before the first forward pass. The model may be compiled before or after.

    Args:
        model: The module that the loop calls.
        optimizer: The optimizer that steps, or all optimizers of the model. A wrapper that holds others in its
            attributes is accepted.
        endpoint: The monitor's address. None takes KOOPMON_ENDPOINT; without that the agent is disabled.
        run: The name of the job. None takes KOOPMON_RUN, else the script's name and 8 hexadecimal digits, the same on
            all ranks.
        config: A Config, its tables as a mapping, or the path of a TOML file. None takes KOOPMON_CONFIG, else the
            defaults.

    Returns a handle. A second call for an attached model or optimizer returns another handle to the same agent, which
    then follows the optimizers of both calls.

    Raises TypeError, ConfigError, EndpointError or AdapterError for errors in the arguments themselves. Any other
    obstacle (the environment, a model without a residual chain, an absent monitor) is logged as one line, and training
    goes on. The agent raises nothing after this call has returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer is a {type(each).__name__}, expected a torch.optim.Optimizer")
    if not optimizers:
        raise TypeError("optimizer is an empty list, expected at least one torch.optim.Optimizer")
    runtime = next(filter(None, map(_attached_runtime, [model, *OptimizerSet(optimizers)])), None)
    if runtime is not None:
        logger.info("koopmon: this training is attached already")
        for each in optimizers:
            runtime.steps.add_optimizer(each)
        for key in runtime.optimizers:
            _runtimes[key] = weakref.ref(runtime)
        return Agent(runtime, joined=True)
    try:
        runtime = _make_runtime(model, optimizers, endpoint, run, config)
    except _NotAttachedError as error:
        log_for_job(logger, f"not attached, training goes on: {error}")
        return Agent(None, str(error))
    for key in (model, *runtime.optimizers):
        _runtimes[key] = weakref.ref(runtime)
    present = {each for reference in list(_runtimes.values()) if (each := reference()) is not None and each.present}
    for each in present:
        each.share_budget(len(present))
    return Agent(runtime)


def _make_runtime(
    model: nn.Module,
    optimizers: list[Optimizer],
    endpoint: str | None,
    run: str | None,
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None,
) -> AgentRuntime:
    settings = _checked(config is not None, lambda: _configured(config))
    named = endpoint or os.environ.get("KOOPMON_ENDPOINT") or ""
    if not named:
        raise _NotAttachedError("no monitor is named; set KOOPMON_ENDPOINT, or start the job with `koopmon run`")
    address = _checked(endpoint is not None, lambda: check_endpoint(named))
    trust = make_auth_policy(**msgspec.structs.asdict(settings.security), environ=os.environ)
    _checked(False, lambda: trust.check_agent_keys(address))
    name = run or os.environ.get("KOOPMON_RUN")
    if name:
        _checked(run is not None, lambda: check_run_name(name))
    if why := refusal(model):
        raise _NotAttachedError(why)
    adapter, stack = settings.model.adapter, settings.model.stack
    if endpoint is None:
        wait_for_monitor()
    by_name = config is not None and (adapter is not None or stack is not None)
    try:
        selection = _with_hooks(model, _checked(by_name, lambda: select(model, adapter, stack)))
        return AgentRuntime(model, optimizers, selection, settings, address, name or None, trust)
    except (KoopmonError, _NotAttachedError):
        raise
    except Exception as error:
        raise_from_signal(error)
        logger.debug("koopmon: attach", exc_info=error)
        raise _NotAttachedError(f"{type(error).__name__}: {error}") from error


def _with_hooks(model: nn.Module, selection: Selection) -> Selection:
    """Return `selection` without stacks of blocks that take no hooks. Raises _NotAttachedError without any other."""
    scripted = torch.jit._script.RecursiveScriptModule  # one that is traced takes hooks
    candidates = tuple(
        stack
        for stack in selection.candidates
        if not any(isinstance(each, scripted) for point in stack.points for each in (point.entry, point.module))
    )
    if not candidates:
        raise _NotAttachedError(
            f"the blocks of {type(model).__name__} are made by torch.jit.script, which takes no hooks;"
            " train the model before they are scripted, or torch.compile it"
        )
    return replace(selection, candidates=candidates)


def _checked(explicit: bool, make: Callable[[], T]) -> T:
    """Return `make()`. A KoopmonError reaches the caller only if the caller wrote the faulty value."""
    try:
        return make()
    except KoopmonError as error:
        if explicit:
            raise
        raise _NotAttachedError(str(error)) from error


def _configured(config: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
    if isinstance(config, Config):
        return configuration.checked(config)
    if isinstance(config, Mapping):
        return configuration.from_mapping(config)
    return configuration.load(config)


def _attached_runtime(key: nn.Module | Optimizer) -> AgentRuntime | None:
    runtime = _runtimes.get(key, lambda: None)()
    return runtime if runtime is not None and runtime.present else None
