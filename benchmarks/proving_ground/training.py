"""One recorded training of the proving ground: its loss, the input of koopmon, and the actions of an arm.

Row t of every series belongs to the forward and backward pass after t optimizer steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ceilings import Ceilings
from benchmarks.control import Control, Controller, Copies
from benchmarks.proving_ground import text
from benchmarks.proving_ground.clipping import gradient_rule
from benchmarks.proving_ground.models import VOCABULARY, Family, attentions, build
from benchmarks.proving_ground.optimizers import OptimizerName, set_rate
from benchmarks.proving_ground.optimizers import build as build_optimizers
from koopmon.agent.capture.log_partition import log_partition
from koopmon.agent.capture.slow_signals import SlowSignals
from koopmon.agent.capture.update_rms import UpdateRms
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.config import CadenceConfig, RiskConfig, merged
from koopmon.plugins import adapters
from koopmon.spectral import SpectralProfile, profile_states

Arm = Literal[
    "clip",
    "qk_norm",
    "zclip",
    "adagc",
    "stable_adamw",
    "spike",
    "backoff",
    "guarded",
    "projection",
    "projection_lr",
]
"""Arms of the comparison.

clip: gradient clipping at 1.0 only. qk_norm: the same with normalised queries and keys, which is another model. zclip,
adagc: other gradient clippings beside it. stable_adamw: update clipping beside it. spike: the rate is halved when the
loss jumps. guarded: koopmon's detector and policy with their defaults. backoff: the same with the policy `lr`, which
only lowers the rate. projection: the same with the policy `kss`, which sets ceilings at the scheduled rate.
projection_lr: the same with the policy `kss+lr`, which does both.
"""
Failure = Literal[
    "",
    "no_warmup",
    "restart",
    "bad_batches",
    "stale_moments",
    "lost_state",
    "finetune",
    "bad_stretch",
    "shift",
    "stale_shift",
    "attention_rate",
    "head_rate",
    "bf16",
    "nan_batch",
]
"""Faults. All but `no_warmup` and `bf16` happen in the middle of the run.

no_warmup: the schedule starts at its peak. restart: the schedule restarts at 30 times the peak rate. bad_batches: five
batches of random bytes. stale_moments: Adam's second moments shrink by a factor of 1,000. lost_state: the job restarts
without the optimizer's state. finetune: it restarts without it, at 30 times the rate, with a warm-up of ten steps.
bad_stretch: 100 batches of random bytes. shift: the first half of the run has lines of one repeated byte, so that its
gradients are small, and the second half has text. stale_shift: the same with beta2 0.999, so that the second moments
stay small for hundreds of steps. attention_rate: queries, keys and values train at 30 times the rate, and their logits
grow. head_rate: the output layer does, without z-loss. bf16: the attention computes in bfloat16. nan_batch: the loss of
one batch is NaN.
"""
FAILURES: tuple[Failure, ...] = tuple(name for name in get_args(Failure) if name)
NEW_LAUNCH: tuple[Failure, ...] = ("lost_state", "finetune")
BAD_BATCHES: Mapping[Failure, int] = {"bad_batches": 5, "bad_stretch": 100}
"""Batches of random bytes, by fault."""
SHIFTS: tuple[Failure, ...] = ("shift", "stale_shift")
APART: Mapping[Failure, str] = {"attention_rate": "attention.qkv", "head_rate": "head"}
"""Part of the names of the parameters whose rate a fault multiplies by RESTART_FACTOR."""
STALE_FACTOR = 1e-3
BETA2, STALE_BETA2 = 0.95, 0.999
FINETUNE_WARMUP = 10
ADAPTERS: Mapping[Family, str] = {"moe": "moe", "mamba": "mamba", "kan": "kan"}
"""Adapter of a family, if it is another one than that of transformers."""

CONTROLS: Mapping[Arm, Control] = {
    "guarded": "auto",
    "backoff": "lr",
    "spike": "spike",
    "projection": "kss",
    "projection_lr": "kss+lr",
}
CLIP = 1.0
LOWEST_RATE = 0.1
"""Share of the peak rate at the end of the cosine."""
RESTART_FACTOR = 30.0
MAX_LOSS = 50.0
BROKEN_STEPS: Mapping[Arm, int] = {"guarded": 50}
"""Steps with a loss above MAX_LOSS or without finite numbers after which a run counts as diverged; others: the first.

koopmon may return to a copy of the weights.
"""
VALIDATION_BATCHES = 40
ONLINE_RANK, ONLINE_SAMPLES = 32, 512
CADENCE = CadenceConfig()
LAST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`lr` is the peak rate; `warmup` linear steps, then a cosine to a tenth. Every arm clips at 1.0.

    With `signals`, a run without a guard takes the snapshots of a guarded one too.
    """

    family: Family
    width: int = 64
    num_layers: int = 4
    lr: float
    seed: int
    arm: Arm = "clip"
    failure: Failure = ""
    steps: int = 500
    warmup: int = 50
    batch: int = 16
    num_tokens: int = 64
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.0
    signals: bool = False

    @property
    def name(self) -> str:
        more = f"-{self.failure}" if self.failure else ""
        more += f"-{self.optimizer}" if self.optimizer != "adamw" else ""
        more += f"-wd{self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.family}-d{self.width}-l{self.num_layers}-lr{self.lr:g}-s{self.seed}-{self.arm}{more}"

    def scheduled_rate(self, step: int) -> float:
        """Return the rate of the schedule at `step`, before koopmon's scale."""
        warmed = 1.0 if self.failure == "no_warmup" else min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.steps)))
        rate = self.lr * warmed * (LOWEST_RATE + (1.0 - LOWEST_RATE) * cosine)
        after = step - self.fault_step
        if after < 0 or self.failure not in ("restart", "finetune"):
            return rate
        rewarmed = min(1.0, (after + 1) / FINETUNE_WARMUP) if self.failure == "finetune" else 1.0
        return rate * rewarmed * RESTART_FACTOR

    @property
    def fault_step(self) -> int:
        return self.steps // 2

    def rate_apart(self, step: int) -> float:
        """Return the rate of the parameters of APART over that of the schedule."""
        return RESTART_FACTOR if self.failure in APART and step >= self.fault_step else 1.0

    def batch_at(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw the batch of `step`, (B, T + 1)."""
        tokens = text.batch(generator, self.batch, self.num_tokens)
        after = step - self.fault_step
        own = torch.Generator().manual_seed(step)
        if 0 <= after < BAD_BATCHES.get(self.failure, 0):
            return torch.randint(VOCABULARY, tokens.shape, generator=own)
        if after < 0 and self.failure in SHIFTS:
            return torch.randint(VOCABULARY, (len(tokens), 1), generator=own).expand_as(tokens)
        return tokens


def train(recipe: Recipe) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Train by `recipe`; return its scalars and its series, for `benchmarks.campaign`."""
    model = build(
        recipe.family,
        width=recipe.width,
        num_layers=recipe.num_layers,
        max_tokens=recipe.num_tokens,
        seed=recipe.seed,
        qk_norm=recipe.arm == "qk_norm",
        dtype=torch.bfloat16 if recipe.failure == "bf16" else torch.float32,
    )
    parameters = list(model.parameters())
    launches = [Launch(recipe, model, 0)]
    rule = gradient_rule(recipe.arm, CLIP)
    takes_snapshots = recipe.signals or CONTROLS.get(recipe.arm, "spike") != "spike"
    recorder = Recorder(model)
    generator = torch.Generator().manual_seed(100 + recipe.seed)
    first_loss = validation_loss(model, recipe)
    losses: list[float] = []
    norms: list[float] = []
    rates: list[float] = []
    diverged_at: int | None = None
    num_broken = 0
    began = time.perf_counter()
    for step in range(recipe.steps):
        tokens = recipe.batch_at(step, generator)
        if recipe.failure in NEW_LAUNCH and step == recipe.fault_step:
            launches.append(Launch(recipe, model, step))
        launch = launches[-1]
        controller, own_step = launch.controller, step - launch.first_step
        if recipe.failure == "stale_moments" and step == recipe.fault_step:
            for state in launch.optimizers[-1].state.values():
                state["exp_avg_sq"].mul_(STALE_FACTOR)
        apart = recipe.rate_apart(step)
        controller.begin(own_step, recipe.scheduled_rate(step), apart)
        scheduled, apart = controller.scheduled, controller.apart
        due = takes_snapshots and is_due(own_step, controller.dense_until)
        if due:
            recorder.start()
        loss = loss_of(model, tokens)
        if recipe.failure == "nan_batch" and step == recipe.fault_step:
            loss = loss * math.nan
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        losses.append(loss.item())
        norms.append(norm.item())
        is_sound = losses[-1] <= MAX_LOSS and math.isfinite(norms[-1])  # False for NaN
        num_broken = 0 if is_sound else num_broken + 1
        diverged_at = None if is_sound else step - num_broken + 1
        if num_broken > BROKEN_STEPS.get(recipe.arm, 0):
            break
        profile = recorder.stop(step) if due else None
        if due or recipe.arm == "spike":
            controller.see(own_step, profile, losses[-1], scheduled, recorder.logits() if due else ())
        rule(parameters, norm)
        rates.append(scheduled * controller.lr_scale)
        set_rate(launch.optimizers, rates[-1] / max(1.0, apart), apart)
        if due:
            recorder.note_update(launch.optimizers)
        for optimizer in launch.optimizers:
            optimizer.step()
        controller.after_update()
    scalars = {
        "diverged_at": diverged_at,
        "first_loss": first_loss,
        "final_loss": None if diverged_at is not None else validation_loss(model, recipe),
        "num_actions": sum(launch.controller.num_actions for launch in launches),
        "num_rewinds": sum(launch.controller.num_rewinds for launch in launches),
        "lost_steps": sum(launch.controller.lost_steps for launch in launches),
        "first_action": next((at for launch in launches if (at := launch.first_action) is not None), None),
        "min_lr_scale": min(launch.controller.min_lr_scale for launch in launches),
        "highest_risk": max(launch.controller.highest_risk for launch in launches),
        "held_steps": sum(launch.controller.held_steps for launch in launches),
        "seconds_per_step": (time.perf_counter() - began) / len(losses),
    }
    series = {"loss": np.array(losses), "grad_norm": np.array(norms), "rate": np.array(rates), **recorder.series()}
    return scalars, series


class Launch:
    """One launch of the job: the weights continue, the optimizer's state and koopmon start from nothing."""

    def __init__(self, recipe: Recipe, model: nn.Module, first_step: int) -> None:
        self.first_step = first_step
        self.optimizers = build_optimizers(
            "stable_adamw" if recipe.arm == "stable_adamw" else recipe.optimizer,
            model,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            beta2=STALE_BETA2 if recipe.failure == "stale_shift" else BETA2,
            apart=APART.get(recipe.failure, ""),
        )
        control = CONTROLS.get(recipe.arm, "")
        self.controller = Controller(
            control,
            width=recipe.width if OptimizerSet(self.optimizers).rate_sized_steps() else 0,
            num_layers=recipe.num_layers,
            exponent=0.0,
            risk=risk_config(recipe.family),
            copies=Copies(model, self.optimizers) if recipe.arm == "guarded" else None,
            ceilings=Ceilings(blocks_of(model)) if control in ("kss", "kss+lr") else None,
        )

    @property
    def first_action(self) -> int | None:
        """Step of the run at which koopmon decided to act for the first time."""
        at = self.controller.first_action
        return None if at is None else self.first_step + at


def risk_config(family: Family) -> RiskConfig:
    """Return the detector's settings with the thresholds of the family's adapter."""
    name = ADAPTERS.get(family)
    return RiskConfig() if name is None else merged(RiskConfig(), adapters()[name].thresholds(), "thresholds")


def is_due(step: int, dense_until: int) -> bool:
    """Return the agent's cadence: dense at the start and on the policy's request, else sparse."""
    dense = step < CADENCE.warmup_steps or step < dense_until
    return step % (CADENCE.dense_every if dense else CADENCE.calm_every) == 0


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the cross-entropy of each next byte, in nats; tokens are (B, T + 1), the result is 0-d."""
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, recipe: Recipe) -> float:
    """Compute the mean loss over the same excerpts of held-out text in every run, in nats."""
    generator = torch.Generator().manual_seed(7)
    batches = [
        text.batch(generator, recipe.batch, recipe.num_tokens, validation=True) for _ in range(VALIDATION_BATCHES)
    ]
    return sum(loss_of(model, tokens).item() for tokens in batches) / VALIDATION_BATCHES


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("blocks").children())


class Recorder:
    """Takes the states of 512 tokens at every depth like the agent, and profiles them at online settings."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._blocks = blocks_of(model)
        self._attentions = attentions(model)
        self._states: list[Tensor] = []
        self._handles: list[Any] = []
        self._steps: list[int] = []
        self._rows: list[dict[str, list[float]]] = []
        self._log_partition: Tensor | None = None
        self._slow = SlowSignals()
        self._logits: list[float | None] = []

    def start(self) -> None:
        blocks = self._blocks
        self._states = []
        self._handles = [blocks[0].register_forward_pre_hook(lambda _, args: self._take(args[0]))]
        self._handles += [block.register_forward_hook(lambda _, __, y: self._take(y)) for block in blocks]
        self._handles.append(self._model.register_forward_hook(lambda _, __, logits: self._take_output(logits)))
        for attention in self._attentions:
            attention.record = True

    def _take(self, state: Tensor) -> None:
        self._states.append(state.detach().flatten(0, 1))

    def _take_output(self, logits: Tensor) -> None:
        self._log_partition = log_partition(logits, (VOCABULARY,))

    def logits(self) -> list[float | None]:
        """Return the largest attention logit of each layer as the agent reports it; None where it is unknown.

        In a calm cadence the agent repeats the values of an earlier snapshot.
        """
        if self._slow.is_due(self._steps[-1]):
            self._slow.note(self._steps[-1])
            self._logits = [each if math.isfinite(each) else None for each in self._rows[-1]["max_logit"]]
        return self._logits

    def note_update(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Add the update RMS of the update that follows, as the agent measures it: after clipping, before the step."""
        update = UpdateRms()
        for optimizer in optimizers:
            update.add(optimizer)
        value = update.end()
        self._rows[-1]["update_rms"] = [math.nan if value is None else float(value)]

    def stop(self, step: int) -> SpectralProfile | None:
        """Profile this forward; None for states that are not finite."""
        for handle in self._handles:
            handle.remove()
        for attention in self._attentions:
            attention.record = False
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(self._states[0]), generator=generator)[:ONLINE_SAMPLES]
        states = [state[chosen] for state in self._states]
        finite = all(bool(state.isfinite().all()) for state in states)
        profile = profile_states(states, svd_rank=ONLINE_RANK, kreiss="never") if finite else None
        self._steps.append(step)
        self._rows.append(self._row(states, profile))
        return profile

    def _row(self, states: list[Tensor], profile: SpectralProfile | None) -> dict[str, list[float]]:
        num_layers = len(states) - 1
        missing = [math.nan] * num_layers
        layers = profile.layers if profile is not None else ()
        logits = [a.max_logit.max().item() if a.max_logit is not None else math.nan for a in self._attentions]
        return {
            "update_ratio": [layer.update_ratio for layer in layers] or missing,
            "spectral_radius": [layer.spectral_radius for layer in layers] or missing,
            "expansive_mass": [layer.expansive_mass for layer in layers] or missing,
            "near_unit_mass": [layer.near_unit_mass for layer in layers] or missing,
            "reliable_mode_ratio": [layer.reliable_mode_ratio for layer in layers] or missing,
            "stream_rms": [state.square().mean().sqrt().item() for state in states[1:]],
            "max_logit": logits or missing,
            "update_rms": [math.nan],
            "log_partition": [math.nan if self._log_partition is None else self._log_partition.item()],
            "informative": [float(profile is not None and profile.informative)],
        }

    def series(self) -> dict[str, np.ndarray[Any, Any]]:
        """`profile_step` (S,), and (S, L) for each quantity of a layer."""
        names = self._rows[0] if self._rows else ()
        found = {name: np.array([row[name] for row in self._rows]) for name in names}
        return {"profile_step": np.array(self._steps), **found}
