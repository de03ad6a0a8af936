"""One small recorded training: its loss and gradients, and the input of every detector.

Row t of every series belongs to the forward and backward pass after t optimizer steps. Diverged is the paper's rule: a
loss above 50, a gradient norm above 500, or either not finite; the training ends there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.control import Control, Controller
from benchmarks.families import SCHEMES, Family, language_model
from benchmarks.faults import Fault, strike
from benchmarks.models import Decoder, Initialisation, Norm
from benchmarks.probes import Probes
from benchmarks.shaping import Form, Shaping
from benchmarks.tasks import TASKS, Task, draw, loss_of, share_right
from koopmon.profiling import CapturedStates, capture_states
from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import SpectralProfile, profile_states

Optimizer = Literal["adamw", "sgd"]
MAX_LOSS, MAX_GRADIENT_NORM = 50.0, 500.0
FIELDS = (
    "near_unit_mass",
    "expansive_mass",
    "spectral_radius",
    "eigenvector_condition_number",
    "nonlinearity_ratio",
    "update_ratio",
    "reliable_mode_ratio",
)
INITIAL_SAMPLES = 2048
ONLINE_RANK, ONLINE_SAMPLES = 32, 512
LAST = 20
"""Number of last steps in the mean that is the final loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training. `warmup` steps of linear rise, then a constant rate; `clip` 0 means no gradient clipping."""

    task: Task = "recall-4"
    family: Family = "transformer"
    norm: Norm = "none"
    """Families other than the transformer have "pre" and "none"."""
    initialisation: Initialisation = "gpt2"
    width: int = 128
    num_layers: int = 4
    lr: float
    seed: int
    steps: int = 250
    batch: int = 16
    warmup: int = 20
    clip: float = 0.0
    optimizer: Optimizer = "adamw"
    """"sgd" has a momentum of 0.9."""
    spectral_norm: bool = False
    """True to divide every linear map of the blocks by its largest singular value, from power iteration."""
    fault: Fault = ""
    fault_step: int = 0
    profile_every: int = 1
    """Optimizer steps between two online profiles; 0 for none."""
    shaping: Form = ""
    """KSS setting that is always on, unless `control` turns it off."""
    alpha: float = 0.15
    tau_u: float = 1.05
    kss_every: int = 1
    kss_rank: int = 32
    layer_fraction: float = 1.0
    kss_delay: int = 0
    control: Control = ""

    @property
    def name(self) -> str:
        more = f"-{self.fault}@{self.fault_step}" if self.fault else ""
        more += "-sgd" if self.optimizer == "sgd" else ""
        more += f"-{self.shaping}" if self.shaping else ""
        more += f"-{self.control}" if self.control else ""
        kind: str = self.norm if self.family == "transformer" else f"{self.family}-{self.norm}"
        kind += "" if self.initialisation == "gpt2" else f"-{self.initialisation}"
        return f"{self.task}-{kind}-d{self.width}-l{self.num_layers}-lr{self.lr:g}-s{self.seed}{more}"

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw tokens (B, T) and labels of a step, with other seeds than the profile's batch."""
        return draw(self.task, self.batch, seed=1_000_003 * (self.seed + 1) + step)

    def loss(self, model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of one forward pass; 0-d."""
        return loss_of(self.task, model(tokens), labels)

    def model(self) -> Decoder:
        shape = TASKS[self.task]
        width, num_layers, vocabulary, seed = self.width, self.num_layers, shape["vocabulary"], self.seed
        if self.family != "transformer":
            if self.norm not in SCHEMES:
                raise ValueError(f"norm = {self.norm!r}: {self.family} allows {', '.join(SCHEMES)}")
            return language_model(
                self.family,
                width=width,
                num_layers=num_layers,
                vocabulary=vocabulary,
                num_tokens=shape["num_tokens"],
                seed=seed,
                scheme=self.norm,
            )
        model = Decoder(
            self.norm,
            width=width,
            num_layers=num_layers,
            max_tokens=shape["num_tokens"],
            vocabulary=vocabulary,
            seed=seed,
            initialisation=self.initialisation,
        )
        if self.spectral_norm:
            for module in list(model.blocks.modules()):
                if isinstance(module, nn.Linear):
                    nn.utils.parametrizations.spectral_norm(module)
        return model

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer at the peak rate; the training has the schedule."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


def train(recipe: Recipe) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Train by `recipe`; return its scalars and its series, for `benchmarks.campaign`."""
    torch.manual_seed(recipe.seed)
    model = recipe.model()
    initial = initial_profile(model, recipe)
    optimizer = recipe.make_optimizer(model)
    recorder = Recorder(model, recipe)
    shaping = _shaping(model, recipe)
    controller = Controller(
        recipe.control,
        width=recipe.width if recipe.optimizer == "adamw" else 0,
        num_layers=recipe.num_layers,
        exponent=initial["update_exponent"],
    )
    losses: list[float] = []
    norms: list[float] = []
    died_at: int | None = None
    began = time.perf_counter()
    for step in range(recipe.steps):
        tokens, labels = recipe.batch_at(step)
        strike(recipe.fault, step - recipe.fault_step, model, optimizer, labels)
        controller.begin(step)
        if recipe.control:
            shaping.alpha, shaping.tau_u = controller.kss.alpha, controller.kss.tau_u
        with recorder.at(step), shaping.watching(step):
            loss = recipe.loss(model, tokens, labels)
        optimizer.zero_grad()
        penalty = shaping.penalty()
        shaping.before_step(penalty)
        objective = loss
        if penalty is not None and shaping.form != "decoupled":
            objective = loss + shaping.alpha * penalty
        objective.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        losses.append(loss.item())
        norms.append(norm.item())
        if not (losses[-1] <= MAX_LOSS and norms[-1] <= MAX_GRADIENT_NORM):  # also true for NaN
            died_at = step
            break
        if recipe.control:
            controller.see(step, recorder.latest, losses[-1], recipe.lr * warmed(recipe, step))
        if recipe.clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), recipe.clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warmed(recipe, step) * controller.lr_scale
        optimizer.step()
        shaping.after_step()
    scalars = {
        "died_at": died_at,
        "first_loss": losses[0],
        "final_loss": None if died_at is not None else float(np.mean(losses[-LAST:])),
        "accuracy": None if died_at is not None else accuracy(model, recipe),
        "num_actions": controller.num_actions,
        "min_lr_scale": controller.min_lr_scale,
        "initial": initial,
        "seconds_per_step": (time.perf_counter() - began) / len(losses),
    }
    return scalars, {"loss": np.array(losses), "grad_norm": np.array(norms), **recorder.series()}


def _shaping(model: Decoder, recipe: Recipe) -> Shaping:
    shaping = Shaping(
        model,
        recipe.shaping,
        alpha=recipe.alpha,
        every=recipe.kss_every,
        svd_rank=recipe.kss_rank,
        fraction=recipe.layer_fraction,
        delay=recipe.kss_delay,
    )
    shaping.tau_u = recipe.tau_u
    return shaping


def warmed(recipe: Recipe, step: int) -> float:
    """Return the schedule's factor at `step`; 1 without a warm-up, as for the fault of that name."""
    if recipe.fault == "no_warmup" or recipe.warmup == 0:
        return 1.0
    return min(1.0, (step + 1) / recipe.warmup)


def initial_profile(model: Decoder, recipe: Recipe) -> dict[str, Any]:
    """Profile a new batch at full rank and N 2048: the mean over layers of each field, before any step."""
    rows = -(-INITIAL_SAMPLES // TASKS[recipe.task]["num_tokens"]) * 2
    tokens, _ = draw(recipe.task, rows, seed=recipe.seed)
    captured, profile = full_profile(model, tokens, seed=recipe.seed)
    means = {field: profile.mean(field) for field in FIELDS}
    risk = initial_risk(profile, known_exponent=captured.known_exponent)
    return {"informative": profile.informative, **means, "update_exponent": risk.update_exponent}


def full_profile(model: nn.Module, tokens: Tensor, *, seed: int) -> tuple[CapturedStates, SpectralProfile]:
    """Profile like `koopmon.profile` at full rank and N 2048, without the Kreiss constants, which take most of the
    time.
    """
    captured = capture_states(model, tokens, num_samples=INITIAL_SAMPLES, seed=seed)
    return captured, profile_states(captured.states, seed=seed, kreiss="never")


@torch.no_grad()
def accuracy(model: nn.Module, recipe: Recipe) -> float:
    """Return the share of right answers on 1,024 new sequences."""
    tokens, labels = draw(recipe.task, 1024, seed=7_000_000 + recipe.seed)
    return share_right(recipe.task, model(tokens), labels)


class Recorder:
    """Takes the states at every depth like the agent, and profiles them at online settings."""

    def __init__(self, model: Decoder, recipe: Recipe) -> None:
        self._recipe = recipe
        self._blocks = model.blocks
        self._probes = Probes(model)
        self._steps: list[int] = []
        self._profiles: list[SpectralProfile | None] = []
        self._readings: list[dict[str, float]] = []
        self._states: list[Tensor] = []
        self._handles: list[Any] = []
        self._step = 0

    @property
    def latest(self) -> SpectralProfile | None:
        return self._profiles[-1] if self._profiles else None

    def at(self, step: int) -> Recorder:
        self._step = step
        return self

    def __enter__(self) -> None:
        every = self._recipe.profile_every
        if every and self._step % every == 0:
            self._states = []
            self._handles = [self._blocks[0].register_forward_pre_hook(lambda _, args: self._take(args[0]))]
            self._handles += [block.register_forward_hook(lambda _, __, y: self._take(y)) for block in self._blocks]
            self._probes.start()

    def __exit__(self, *_: object) -> None:
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._steps.append(self._step)
        self._readings.append(self._probes.stop(self._states))
        rows = self._chosen()
        states = [state.flatten(0, 1)[rows] for state in self._states]
        finite = all(bool(state.isfinite().all()) for state in states)
        self._profiles.append(profile_states(states, svd_rank=ONLINE_RANK, kreiss="never") if finite else None)

    def _take(self, state: Tensor) -> None:
        self._states.append(state.detach())

    def _chosen(self) -> Tensor:
        """Choose the same rows at every depth, other ones at every step."""
        total = self._states[0].shape[:2].numel()
        generator = torch.Generator().manual_seed(self._step)
        return torch.randperm(total, generator=generator)[:ONLINE_SAMPLES]

    def series(self) -> dict[str, np.ndarray[Any, Any]]:
        """`profile_step` (S,), each field (S, L), each probe (S,); NaN for states that are not finite."""
        if not self._steps:
            return {}
        shape = len(self._blocks)
        found = {"profile_step": np.array(self._steps)}
        for field in FIELDS:
            rows = [
                [math.nan] * shape if profile is None else [getattr(layer, field) for layer in profile.layers]
                for profile in self._profiles
            ]
            found[field] = np.array(rows, dtype=np.float64)
        found["informative"] = np.array([profile is not None and profile.informative for profile in self._profiles])
        for name in self._readings[0]:
            found[name] = np.array([reading[name] for reading in self._readings])
        return found
