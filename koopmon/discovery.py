"""Discovery of a model's residual stream: the adapter for its family, and the stack that a forward pass verifies."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from koopmon.api import ArchitectureAdapter, Discovery, Stack
from koopmon.chain_verifier import ChainResult, ChainVerifier
from koopmon.errors import AdapterError, DiscoveryError
from koopmon.plugins import Selection, fall_back, original, select

__all__ = ["ChainResult", "ChainVerifier", "discover", "not_verified", "probe", "verified", "with_fallback"]

T = TypeVar("T")


def discover(
    model: nn.Module,
    *batch: Any,
    adapter: str | ArchitectureAdapter | None = None,
    stack: str | None = None,
    **batch_kwargs: Any,
) -> Discovery:
    """Find the residual stream of `model`: its adapter and one point per block.

    With a batch, the model is called as `model(*batch, **batch_kwargs)` in eval and no_grad, and the chain is verified.
    If there is none, a second call with gradients shows if the model mixes between its blocks.
    Its mode and the random state are restored. Of several chains the longest is kept, of equals the one called last,
    which is the decoder of an encoder-decoder. If a third-party adapter proves wrong, koopmon's own replaces it and the
    model is called again. Without a batch the best candidate is returned, not verified.

    `adapter` is the name of an adapter, or an adapter; `stack` is the path of the list of blocks to take, "" for the
    model's own. Raises AdapterError and DiscoveryError as `koopmon.plugins.select`, and DiscoveryError with each
    candidate's reason if none is a chain.
    """
    selection = select(model, adapter, stack)
    if not batch and not batch_kwargs:
        return Discovery(original(selection.adapter), selection.candidates[0], flags=selection.flags)

    def look(selection: Selection) -> Discovery:
        return verify(model, selection, batch, batch_kwargs)

    return with_fallback(model, selection, look)


def verify(model: nn.Module, selection: Selection, batch: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Discovery:
    """Return the discovery that forward passes of `model` on a batch verify. Raises DiscoveryError without one."""
    result = ChainResult(None, {})
    for gradients in (False, True):
        verifier = ChainVerifier(selection.adapter, selection.candidates)
        with probe(model, gradients=gradients) as call, verifier.watch():
            call(*batch, **kwargs)
        result = verifier.verdict()
        if result.stack is not None:
            break
    return verified(model, selection, *result)


def with_fallback(model: nn.Module, selection: Selection, look: Callable[[Selection], T]) -> T:
    """Return `look(selection)`. If a third-party adapter fails, `look` is called again with koopmon's own."""
    try:
        return look(selection)
    except AdapterError as error:
        following = fall_back(selection, model, error)
        if following is None:
            raise
    return look(following)


def verified(model: nn.Module, selection: Selection, kept: Stack | None, reasons: Mapping[str, str]) -> Discovery:
    """Return the discovery of a verdict. Raises DiscoveryError with the reasons if no stack was kept."""
    if kept is None:
        raise DiscoveryError(not_verified(model, selection, reasons))
    return Discovery(original(selection.adapter), kept, verified=True, rejected=reasons, flags=selection.flags)


def not_verified(
    model: nn.Module,
    selection: Selection,
    reasons: Mapping[str, str],
    remedy: str = "pass stack= to name the list of blocks that is one",
) -> str:
    """Return one line with the reason against each candidate of `selection` as a chain in `model`, and the remedy."""
    rejected = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in reasons.items())
    return f"adapter {selection.adapter.name!r} finds no residual chain in {type(model).__name__}: {rejected}; {remedy}"


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy, the CPU and every GPU at the end."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled models as written.

    A compiler that traced the hooks of koopmon would keep guards on what they read.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def probe(model: nn.Module, *, gradients: bool = False) -> Iterator[nn.Module]:
    """Yield the module to call for a forward pass without side effects.

    Eval mode is set, and no_grad without `gradients`. Modes and random states are restored. Compiled parts run as
    written. The module inside a DistributedDataParallel wrapper is yielded, so that no collective runs. The fused
    inference path of torch.nn.TransformerEncoder is off, because it turns a padded batch into a nested tensor.
    """
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        with eager(), random_state_kept(), torch.set_grad_enabled(gradients):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield model.module if isinstance(model, DistributedDataParallel) else model
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training
