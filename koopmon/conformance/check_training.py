"""Checks of an adapter's effect on a training: none without a command, and exactly the commanded one otherwise.

Shapes: L blocks, N sampled tokens, D width; P = L + 1 points.
"""

from __future__ import annotations

from unittest import SkipTest

import torch
from msgspec.structs import replace
from torch import Tensor

from koopmon.conformance.harness import Bench, same_bits
from koopmon.conformance.result import ConformanceError, demand
from koopmon.conformance.training import LEARNING_RATE, NUM_SAMPLES, SEED, Attached, Seen, Training, Witness
from koopmon.errors import foreign_code
from koopmon.spectral import kss_basis, kss_gradient, kss_loss
from koopmon.token_sampling import align_mask, order_rows, take_rows
from koopmon.wire.messages import KssSettings

NUM_STEPS = 4
KSS = KssSettings(tau_u=0.9, beta=0.8, svd_rank=6, num_samples=24)
"""Settings with which both terms of the loss are active on any spectrum."""
MAX_ALPHA = 900.0
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}
"""Allowed relative difference of gradients; a model may compute internally in a lower precision than its parameters."""


def taps(bench: Bench, *, microbatches: int = 1, evaluate: bool = False, checkpointing: bool = False) -> str:
    """Each block is called once in a training forward, and each optimizer step gives one snapshot of its states."""
    if checkpointing:
        _require_checkpointing(bench)
    training = Training(bench, microbatches=microbatches, checkpointing=checkpointing)
    likely = bench.likely_stack(training.model)
    witness = Witness(bench, training.model, likely)
    trial = Training(bench)
    counted = Witness(bench, trial.model, bench.likely_stack(trial.model))
    trial.backward()
    for name, calls in counted.forwards[0].calls.items():
        demand(calls == 1, f"the tap at {name} fires {calls} times in one training forward, expected once")
    bench.stack(training.model)
    with Attached(training) as attached:
        for _ in range(NUM_STEPS):
            if evaluate:
                training.evaluate()
            training.backward()
            if evaluate:
                training.evaluate()
            training.update()
        attached.check()
        taken = attached.notebook.snapshots
    steps = [snapshot.step for snapshot in taken]
    # The first forward pass verifies the chain and gives no snapshot.
    expected = list(range(1, NUM_STEPS))
    demand(steps == expected, f"there are snapshots of the steps {steps}, expected one of each of {expected}")
    for snapshot in taken:
        seen = witness.forwards[snapshot.step * microbatches]
        rows = _rows(seen, NUM_SAMPLES, snapshot.step)
        whole = len(seen.states) == len(snapshot.states)
        demand(whole, f"the snapshot of step {snapshot.step} has {len(snapshot.states)} states of {len(seen.states)}")
        places = ["the input of the first block", *(point.name for point in likely.points)]
        for place, state, found in zip(places, seen.states, snapshot.states, strict=True):
            held = same_bits(found, take_rows(state, rows).to(found))
            expected_states = f"the states of the step's first microbatch behind {place}"
            demand(held, f"the snapshot of step {snapshot.step} does not hold {expected_states}")
    return f"{len(taken)} snapshots in {NUM_STEPS} steps of {microbatches}, each of {len(likely.points) + 1} points"


def losses(bench: Bench) -> str:
    """With the agent attached and a snapshot at every step, training is bit-identical to training without the agent."""
    plain, watched = Training(bench, microbatches=2), Training(bench, microbatches=2)
    bench.likely_stack(watched.model)
    with Attached(watched) as attached:
        for training in (plain, watched):
            training.run(NUM_STEPS)
    for index, (theirs, ours) in enumerate(zip(plain.losses, watched.losses, strict=True)):
        if not same_bits(theirs, ours):
            _require_repeatable(bench, plain)
        compared = f"{ours.item()!r} with the agent attached, {theirs.item()!r} without"
        demand(same_bits(theirs, ours), f"the loss of microbatch {index} is {compared}")
    for index, (theirs, ours) in enumerate(zip(plain.random_states, watched.random_states, strict=True)):
        demand(torch.equal(theirs, ours), f"the random state after microbatch {index} is another with the agent")
    demand(same_bits(plain.values(), watched.values()), "the parameters at the end are others with the agent attached")
    bench.stack(watched.model)
    attached.check()
    return f"{len(plain.losses)} microbatches in {NUM_STEPS} steps, bit-identical"


def _require_repeatable(bench: Bench, first: Training) -> None:
    """Raise SkipTest when two identical trainings differ, as with nondeterministic kernels on accelerators."""
    second = Training(bench, microbatches=2)
    second.run(NUM_STEPS)
    if not all(map(same_bits, first.losses, second.losses)):
        raise SkipTest("the example's own training does not repeat bit for bit")


def kss(bench: Bench, *, checkpointing: bool = False) -> str:
    """The gradient with KSS in force equals that of an explicit (loss + alpha * kss).backward()."""
    if checkpointing:
        _require_checkpointing(bench)
    dtype = bench.precise
    alpha = _balanced_alpha(bench)
    written = _Explicit(bench, alpha, microbatches=2, learning_rate=0.0)
    plain = Training(bench, dtype=dtype, microbatches=2, learning_rate=0.0)
    guarded = Training(bench, dtype=dtype, microbatches=2, learning_rate=0.0, checkpointing=checkpointing)
    with Attached(guarded, through_shielded=bench.through_shielded) as attached:
        for step in range(3):
            written.with_kss = step == 2
            for training in (guarded, plain, written):
                training.backward()
                if step < 2:
                    training.update()
            if step == 0:
                attached.command("set_kss", kss=replace(KSS, alpha=alpha))
        attached.check()
        demand(attached.alpha == alpha, f"alpha {attached.alpha} is in force after a command of {alpha}")
    share = written.gradient() - plain.gradient()
    difference = _relative(guarded.gradient() - plain.gradient() - share, share)
    name = str(dtype).removeprefix("torch.")
    allowed = TOLERANCES[dtype]
    demand(
        difference <= allowed,
        f"the gradient of alpha * kss differs from the explicit one by {difference:.1e} of its norm ({name}), allowed "
        f"are {allowed:.0e} (1.0: nothing of it arrives)",
    )
    return f"relative difference {difference:.0e} in {name}, {allowed:.0e} allowed"


def learning_rate(bench: Bench) -> str:
    """After a temporary LR scale, the parameters equal those of a training with a manually scaled learning rate."""
    guarded, hand = Training(bench), Training(bench)
    bench.stack(guarded.model)
    before = [group["lr"] for group in guarded.optimizer.param_groups]
    scales = []
    with Attached(guarded) as attached:
        for step in range(6):
            if step in (2, 4):
                attached.command("set_lr_scale", lr_scale=0.5 if step == 2 else 1.0)
            guarded.run(1)
            scales.append(attached.lr_scale)
            after = [group["lr"] for group in guarded.optimizer.param_groups]
            demand(after == before, f"between steps the learning rates are {after}, expected the user's own {before}")
            for group, rate in zip(hand.optimizer.param_groups, before, strict=True):
                group["lr"] = rate * scales[-1]
            hand.run(1)
        attached.check()
    demand(scales == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0], f"the scales in force were {scales}")
    demand(same_bits(guarded.values(), hand.values()), "the parameters are not those of a rate that was scaled by hand")
    return "0.5 for two steps and back, bit-identical to a rate scaled by hand"


def kss_on_and_off(bench: Bench) -> str:
    """After temporary KSS, the parameters equal those of a training with KSS in its loss for the same steps."""
    dtype = bench.precise
    alpha = _balanced_alpha(bench)
    guarded, plain = Training(bench, dtype=dtype), Training(bench, dtype=dtype)
    hand = _Explicit(bench, alpha)
    alphas = []
    with Attached(guarded, through_shielded=bench.through_shielded) as attached:
        for step in range(6):
            if step in (1, 3):
                attached.command("set_kss", kss=replace(KSS, alpha=alpha if step == 1 else 0.0))
            alphas.append(attached.alpha)
            hand.with_kss = alphas[-1] > 0.0
            for training in (guarded, plain, hand):
                training.run(1)
        attached.check()
    demand([each > 0.0 for each in alphas] == [False, False, True, True, False, False], f"alpha was in turn {alphas}")
    share = hand.values() - plain.values()
    difference = _relative(guarded.values() - hand.values(), share)
    allowed = TOLERANCES[dtype]
    rounding = 4.0 * torch.finfo(dtype).eps * _relative(plain.values(), share)
    demand(
        difference <= allowed + rounding,
        f"the parameters differ from those of KSS in the loss by {difference:.1e} of the effect of KSS, allowed are "
        f"{allowed:.0e}",
    )
    return f"on for two steps and off again, relative difference {difference:.0e} from the same by hand"


def _require_checkpointing(bench: Bench) -> None:
    """Raise SkipTest if the example does not train under activation checkpointing even without an agent."""
    trial = Training(bench, checkpointing=True)
    what = "the model itself does not train under activation checkpointing"
    with foreign_code(lambda why: SkipTest(f"{what}: it {why}")):
        trial.backward()


class _Explicit(Training):
    """A training with alpha * mean over layers of L_KSS in its loss, differentiated by autograd, while `with_kss`."""

    def __init__(
        self, bench: Bench, alpha: float, *, microbatches: int = 1, learning_rate: float = LEARNING_RATE
    ) -> None:
        super().__init__(bench, dtype=bench.precise, microbatches=microbatches, learning_rate=learning_rate)
        self.alpha = alpha
        self.with_kss = False
        self._stack = bench.stack(self.model)
        self._witness = Witness(bench, self.model, self._stack, graph=True)
        self.trusted = 0
        """Number of block gradients accepted by `kss_gradient` so far."""

    def penalty(self) -> Tensor | None:
        if not self.with_kss:
            return None
        seen, num_layers = self._witness.forwards[-1], len(self._stack.points)
        rows = _rows(seen, KSS.num_samples, self.step, fill=True)
        total = torch.zeros((), dtype=seen.states[0].dtype, device=seen.states[0].device)
        for layer in range(num_layers):
            state = seen.states[layer + 1]
            name = self._stack.points[layer].name
            demand(state.requires_grad, f"the state that block_output gives at {name} has no gradient: it is detached")
            x, y = take_rows(seen.states[layer], rows), take_rows(state, rows)
            total = total + self._layer(x, y)
        return self.alpha * total / num_layers

    def _layer(self, x: Tensor, y: Tensor) -> Tensor:
        basis = kss_basis(x.detach(), KSS.svd_rank, SEED)
        terms = {name: getattr(KSS, name) for name in ("temperature", "tau_u", "tau_l", "gamma", "beta")}
        if not kss_gradient(x.detach(), y.detach(), basis, **terms).ok:
            return 0.0 * y.sum()  # the agent skips these blocks too
        self.trusted += 1
        return kss_loss(x, y, basis=basis, **terms)


def _balanced_alpha(bench: Bench) -> float:
    """Return the alpha at which the gradient norms of KSS and of the task are equal. It is measured once."""
    if bench.alpha is None:
        probing = _Explicit(bench, 1.0, microbatches=2, learning_rate=0.0)
        probing.backward()
        task = probing.gradient()
        probing.with_kss = True
        probing.backward()
        share = probing.gradient() - task
        demand(torch.isfinite(share).all(), "the gradient of the example's KSS loss is not finite")
        demand(probing.trusted, "no block's KSS gradient can be trusted: the example's states are degenerate")
        demand(share.any(), "the KSS loss of the states that the adapter reads has no gradient in any parameter")
        ratio = float(task.norm() / share.norm())
        bench.alpha = min(ratio, MAX_ALPHA) if ratio > 0.0 else 1.0
    return bench.alpha


def _rows(seen: Seen, num_samples: int, step: int, *, fill: bool = False) -> Tensor:
    """Return the row indices that the agent samples from a forward; `fill` repeats them up to `num_samples`."""
    if not seen.states:
        raise ConformanceError("the adapter reads no state in a training forward")
    leading, device = seen.states[0].shape[:-1], seen.states[0].device
    mask = align_mask(seen.mask, leading)
    rows, num_valid = order_rows(leading.numel(), num_samples, seed=SEED, step=step, mask=mask, device=device)
    if not fill:
        return rows[: int(num_valid)]
    return rows[torch.arange(len(rows), device=rows.device) % num_valid.clamp(min=1)]


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm())
