"""Check of a model: block discovery and parallel layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koopmon.doctor.findings import Finding, fail, ok, warn
from koopmon.errors import KoopmonError, describe_error, raise_from_signal

if TYPE_CHECKING:
    from torch import nn

    from koopmon.config import ModelConfig


def taps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: ModelConfig) -> Finding:
    """Run one forward pass and report the matching adapter and the points that it would tap."""
    from koopmon.agent.parallelism import refusal
    from koopmon.discovery import discover

    kind = type(model).__name__
    if why := refusal(model):
        return fail("taps", f"{kind}: {why}", "docs/support.md lists the supported layouts")
    try:
        found = discover(model, *args, adapter=config.adapter, stack=config.stack, **kwargs)
    except KoopmonError as error:
        fix = "set the list of blocks with [model] stack, or write an adapter (docs/write-an-adapter.md)"
        return fail("taps", str(error), fix)
    except BaseException as error:  # raised by the model's own forward pass
        raise_from_signal(error)
        said = f"{kind}: the forward pass raised {describe_error(error, 200)}"
        return fail("taps", said, "check that the model accepts the factory's batch")
    names = [point.name for point in found.points]
    shown = f"{names[0]} to {names[-1]}" if len(names) > 1 else ", ".join(names)
    said = f"{kind}: adapter {found.adapter.name!r}, {len(names)} blocks, {shown}"
    if not found.verified:
        return warn("taps", f"{said}; not verified", "return a batch beside the model from the factory")
    return ok("taps", said)
