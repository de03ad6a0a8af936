"""Causes of an alarm: the signal that shows each, what koopmon does, and the advice.

The detector and the policy decide from the risk alone. A cause explains an alarm in words; its table is also that of
docs/method.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from koopmon.risk import radius_fall, start_growth
from koopmon.risk.logit_growth import GROWTH, LEAST_LOGIT

if TYPE_CHECKING:
    from koopmon.risk.online_detector import Observation
    from koopmon.risk.start_growth import StartGrowth

TAKEOVER_RADIUS, TAKEOVER_RATIO = 50.0, 5.0
"""Spectral radius of a block, and its ratio to that of any other, from which the block takes over the stream.

Chosen by hand: at the best rates of `benchmarks.proving_ground` the radius is 5 to 40, in ruined runs 100 and more.
"""
HIGH_LOGIT, SEVERE_LOGIT = 1e3, 1e4
"""Attention logits from which the loss gets worse, and above which every run diverged (arXiv 2309.14322)."""
UPDATE_RATIO = 10.0
"""Update RMS over its median from which gradients have outgrown their second moments. Chosen by hand."""
NUM_UPDATES, MIN_UPDATES = 32, 8
"""Snapshots that the median covers, and the smallest number of them that gives one."""
HIGH_PARTITION = 100.0
"""Size of the output's log-partition, in nats, from which its logits drift. A uniform output over 100,000 has 12."""

UpdateHistory = tuple[float, ...]
"""Update RMS of the snapshots before, oldest first."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause. All texts but `name` are for users, in Markdown."""

    name: str
    title: str
    signal: str
    """The rule of `find` in words."""
    action: str
    """Reaction of the policy at an alarm with this cause."""
    effect: str
    """Expected effect of the action."""
    next: str
    """Advice for the case that the alarm returns."""
    find: Callable[[Observation, UpdateHistory], str] | None = None
    """Returns the words for the reason of an alarm, or an empty text. None for a cause that no signal shows."""


def _attention(seen: Observation, _: UpdateHistory) -> str:
    if seen.max_attention_logit is None or not seen.max_attention_logit >= HIGH_LOGIT:
        return ""
    return f"attention logits of layer {seen.max_attention_layer} reached {seen.max_attention_logit:,.0f}"


def grown_logits(seen: Observation, growth: float) -> str:
    """Return the words for attention logits that have grown by `growth` times GROWTH over the run's own level."""
    logit, ratio = seen.max_attention_logit or 0.0, growth * GROWTH
    return f"attention logits of layer {seen.max_attention_layer} grew to {logit:,.0f}, {ratio:.1f} times their level"


def grown_ratios(seen: Observation, start: StartGrowth) -> str:
    """Return the words for update ratios that have grown since the first snapshot, without a warm-up."""
    steps = seen.step - (start.step or 0)
    return f"no warm-up: the update ratio of layer {start.layer} is high after {steps} steps at the full learning rate"


def overwritten(seen: Observation, level: float) -> str:
    """Return the words for blocks that overwrite the stream, in a run whose largest radius was `level`."""
    radius = f"{seen.max_spectral_radius or 0.0:.2g}"
    return f"the blocks overwrite the stream: the largest radius fell from {level:,.0f} to {radius}"


def _takeover(seen: Observation, _: UpdateHistory) -> str:
    radii = seen.spectral_radii
    if len(radii) < 2:
        return ""
    following, largest = sorted(radii)[-2:]
    if not largest >= max(TAKEOVER_RADIUS, TAKEOVER_RATIO * following):
        return ""
    return f"block {radii.index(largest)} takes over the stream: radius {largest:,.0f}"


def _update(seen: Observation, before: UpdateHistory) -> str:
    value = seen.training.update_rms
    if value is None or len(before) < MIN_UPDATES:
        return ""
    usual = statistics.median(before)
    return f"update RMS {value / usual:,.0f} times its median" if value >= UPDATE_RATIO * usual > 0.0 else ""


def _output(seen: Observation, _: UpdateHistory) -> str:
    value = seen.training.log_partition
    return (
        "" if value is None or not abs(value) >= HIGH_PARTITION else f"output logits drift: log-partition {value:,.0f}"
    )


_LOWER_RATE = (
    "Normalised layers: cap on the rate, and back to a copy from before the rate was too high. Others: lower rate."
)

CAUSES: tuple[Cause, ...] = (
    Cause(
        "attention",
        "Attention logits",
        f"an attention logit of at least {HIGH_LOGIT:,.0f}; or, normalised layers above the critical rate, one of at "
        f"least {LEAST_LOGIT:g} and {GROWTH:g} times the run's own level, which raises the alarm",
        f"{_LOWER_RATE} A parameter group whose rate outgrew the others keeps its rate beside them.",
        "The logits of the copy are smaller, and at the lower rate they stay below 1,000.",
        "Lower the peak rate, or train with QK-norm.",
        _attention,
    ),
    Cause(
        "warmup",
        "No warm-up",
        f"normalised layers in the first {start_growth.START_STEPS} steps: an update ratio {start_growth.GROWTH:g} "
        f"times its first value, while the learning rate is at most {start_growth.MAX_RISE:g} times its first value. "
        f"It raises the alarm; from {start_growth.EXPLAINS * start_growth.GROWTH:g} times on it explains another alarm",
        "Normalised layers: back to the start, and the rate rises over `[policy] rewind_warmup_steps`. Others: lower "
        "rate.",
        "The update ratios grow several times more slowly, and the run ends as one with a warm-up.",
        "Add a warm-up to the schedule.",
    ),
    Cause(
        "overwritten",
        "Overwritten stream",
        f"normalised layers: in {radius_fall.SNAPSHOTS} snapshots in a row, a largest spectral radius of at most 1 / "
        f"{radius_fall.FALL:g} of that at the start. It raises the alarm",
        _LOWER_RATE,
        "The radius rises again, and the loss falls. Blocks that overwrite the stream learn nothing more.",
        "Lower the peak rate, or train with Pre-LN.",
    ),
    Cause(
        "takeover",
        "Stream take-over",
        f"a spectral radius of at least {TAKEOVER_RADIUS:g}, {TAKEOVER_RATIO:g} times that of any other block",
        f"{_LOWER_RATE} Policies `kss` and `kss+lr`: ceilings on what the block writes.",
        "The radius of the block falls to that of the run while calm. A lower rate alone rarely undoes a take-over.",
        "Lower the peak rate, or make the warm-up longer.",
        _takeover,
    ),
    Cause(
        "update",
        "Stale second moments",
        f"an update RMS of at least {UPDATE_RATIO:g} times the median of up to {NUM_UPDATES} snapshots",
        "Lower rate, or cap and rewind, as for any alarm.",
        "The second moments follow the gradients within 1 / (1 - beta2) steps, and the update RMS returns to about 1.",
        "Lower beta2 (0.95), or clip updates as StableAdamW does. Look for a change of the data.",
        _update,
    ),
    Cause(
        "output",
        "Output logits",
        f"a log-partition of at least {HIGH_PARTITION:g} nats, of either sign",
        _LOWER_RATE,
        "The log-partition stops growing.",
        "Add z-loss (1e-4 x the square of the log-partition).",
        _output,
    ),
    Cause(
        "rate",
        "Learning rate",
        "unsteady update ratios, and none of the signals above",
        _LOWER_RATE,
        "The risk falls below `[policy] release_risk` within some snapshots.",
        "Lower the peak rate, or make the warm-up longer.",
    ),
    Cause(
        "broken",
        "Numbers that are not finite",
        "NaN or infinity in the states",
        "Back to the last copy, where the loss or the gradient norm is not finite either: at the same rate the first "
        "time, at a lower one later. Without copies: lower rate. A stop once nothing is left.",
        "The weights are finite again, and the batch at fault is past. A lower rate repairs no NaN.",
        "Restart from a checkpoint. Look for overflow in 16 bits and for a bad batch.",
    ),
)
"""All causes that have an advice, the most specific first."""


def find(seen: Observation, before: UpdateHistory) -> dict[str, str]:
    """Return the words of each cause that a signal of `seen` shows, by the name of the cause.

    Args:
        seen: the snapshot.
        before: update RMS of the snapshots before it.
    """
    found = {cause.name: cause.find(seen, before) for cause in CAUSES if cause.find is not None}
    return {name: words for name, words in found.items() if words}


def remember(before: UpdateHistory, update_rms: float | None) -> UpdateHistory:
    """Add the update RMS of a snapshot to those before it, unless it is unknown or not finite."""
    if update_rms is None or not (math.isfinite(update_rms) and update_rms >= 0.0):
        return before
    return (*before, update_rms)[-NUM_UPDATES:]


def table() -> str:
    """Return the table of docs/method.md."""
    head = ("cause", "signal", "action", "expected effect", "next, if it returns")
    rows = [head, ("---",) * len(head)]
    rows += [(each.title, each.signal, each.action, each.effect, each.next) for each in CAUSES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
