"""Check of a model: block discovery and parallel layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koopmon.doctor.findings import Finding, fail, ok, warn
from koopmon.errors import KoopmonError, one_line, raise_from_signal

if TYPE_CHECKING:
    from torch import nn

    from koopmon.config import ModelConfig


def taps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: ModelConfig) -> Finding:
    """Run one forward pass and report the matching adapter and the points that it would tap."""
    from koopmon.agent.parallelism import refusal
    from koopmon.discovery import discover

    kind = type(model).__name__
    if why := refusal(model):
        return fail("taps", f"{kind}: {why}", "docs/support.md has the layouts that are known")
    try:
        found = discover(model, *args, adapter=config.adapter, stack=config.stack, **kwargs)
    except KoopmonError as error:
        return fail("taps", str(error), "name the list of blocks: [model] stack; or write an adapter in 15 minutes")
    except BaseException as error:  # raised by the model's own forward pass
        raise_from_signal(error)
        said = f"{kind}: the forward pass raised {type(error).__name__}: {one_line(error, 200)}"
        return fail("taps", said, "see that the factory's batch is what the model takes")
    names = [point.name for point in found.points]
    shown = f"{names[0]} to {names[-1]}" if len(names) > 1 else ", ".join(names)
    said = f"{kind}: adapter {found.adapter.name!r}, {len(names)} blocks, {shown}"
    if not found.verified:
        return warn("taps", f"{said}; not verified", "let the factory return a batch beside the model")
    return ok("taps", said)
