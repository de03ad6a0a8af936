"""Rules for KSS: by projection, with ceilings on what layers write, and as published, with a gradient."""

from __future__ import annotations

import math
from dataclasses import replace

from koopmon.config import KssConfig, PolicyConfig
from koopmon.policy import projection
from koopmon.policy.state import Action, Case, Phase, PolicyState, Proposal
from koopmon.risk.online_detector import Observation
from koopmon.wire.messages import MAX_MODULUS, KssSettings


def shape(case: Case) -> Proposal | None:
    """Turn KSS as published on: at the alarm under the policy `kss`, beside each back-off under `kss+lr`."""
    state, config = case.state, case.config
    if not case.acts_on_kss or case.kss.method != "published" or state.kss.alpha > 0 or case.kss.alpha <= 0:
        return None
    due = case.alarmed and case.settled if config.name == "kss" else state.num_cuts > state.kss_cut
    if not due or case.seen.non_finite:
        return None
    radius = state.calm_radius or 1.0
    if radius >= MAX_MODULUS:
        why = f"KSS stays off: the run's calm spectral radius is {radius:.3g}, and tau_u is {MAX_MODULUS:g} at most"
        return (), replace(state, kss_barred=True), why
    # The threshold lies above the radius of this run while calm. The paper's 1.05 forbids growth that learning needs
    # (docs/method.md).
    tau_u = min(max(case.kss.min_tau_u, case.kss.radius_margin * radius), MAX_MODULUS)
    shared = set(KssSettings.__struct_fields__).intersection(KssConfig.__struct_fields__)
    settings = KssSettings(tau_u=tau_u, **{name: getattr(case.kss, name) for name in shared})
    action = Action(
        kind="set_kss",
        reason=f"risk {case.risk.value:.2f}: KSS on, alpha {settings.alpha:g} above modulus {tau_u:.2f}",
        kss=settings,
        ramp_steps=config.kss_ramp_steps,
        expires_in_steps=config.expires_in_steps,
    )
    following = replace(
        state,
        kss=settings,
        kss_on_at=case.seen.step,
        kss_cut=state.num_cuts,
        loss_at_kss=case.seen.training.loss,
        acted_at=case.seen.step if config.name == "kss" else state.acted_at,
        risk_at_action=case.risk.value if config.name == "kss" else state.risk_at_action,
        phase="acting",
    )
    return (action,), following, ""


def _without_kss(case: Case, why: str, **changes: object) -> Proposal:
    """Turn KSS off for the reason `why`; `changes` are further fields of the following state."""
    if case.state.held_layers:
        action = Action(
            kind="set_ceilings",
            reason=f"ceilings released: {why}",
            ceilings={},
            expires_in_steps=case.config.expires_in_steps,
        )
        return (action,), replace(case.state, held_layers=(), kss_on_at=None, **changes), ""  # type: ignore[arg-type]
    action = Action(
        kind="set_kss",
        reason=f"KSS off: {why}",
        kss=KssSettings(),
        ramp_steps=case.config.kss_ramp_steps,
        expires_in_steps=case.config.expires_in_steps,
    )
    return (action,), replace(case.state, kss=KssSettings(), kss_on_at=None, **changes), ""  # type: ignore[arg-type]


def is_harmed(state: PolicyState, seen: Observation, config: PolicyConfig) -> bool:
    """Return True if the loss exceeds `harm_ratio` times its value before KSS. One of 0 or less has no such ratio."""
    before, after = state.loss_at_kss, seen.training.loss
    if state.kss_on_at is None or before is None or after is None:
        return False
    return 0.0 < before * config.harm_ratio < after < math.inf


def bar_kss(case: Case) -> Proposal | None:
    """Turn KSS off for good where it harms: at once as published, and ceilings at a loss that stays high.

    A severe risk in full force ends KSS as published too, whose gradients may be the cause. Ceilings add no gradients,
    and at a rate that is too high the loss has spikes without them too.
    """
    state, config = case.state, case.config
    if state.kss_on_at is None or case.seen.step - state.kss_on_at < config.kss_ramp_steps + config.cooldown_steps:
        return None
    if case.severe and not state.held_layers:
        return _without_kss(case, f"the risk is {case.risk.value:.2f} in spite of it", kss_barred=True)
    if state.harm_streak < (config.cooldown_steps if state.held_layers else 1):
        return None
    why = f"the loss rose from {state.loss_at_kss:.3g} to {case.seen.training.loss:.3g} under it"
    return _without_kss(case, why, kss_barred=True)


def stop_shaping(case: Case) -> Proposal | None:
    """Turn KSS as published off after `kss_hold_steps`. Runs under it for longer learned less (`benchmarks.kss`)."""
    state, hold = case.state, case.config.kss_hold_steps
    if state.kss_on_at is None or state.held_layers or case.seen.step - state.kss_on_at < hold:
        return None
    return _without_kss(case, f"on for {hold} steps", phase=_phase_without_kss(state))


def _phase_without_kss(state: PolicyState) -> Phase:
    return "calm" if state.lr_scale >= 1.0 and state.phase != "acting" else state.phase


def project(case: Case) -> Proposal | None:
    """Set ceilings on what layers write at an alarm, and correct them at each snapshot that shows the last ones.

    The first ceilings of an alarm are an action. Corrections belong to it.
    """
    state, config, seen = case.state, case.config, case.seen
    if not case.acts_on_kss or case.kss.method != "projection" or seen.step < state.shown_from:
        return None
    first = not state.held_layers
    if first and not case.alarmed:
        return None
    factors = projection.ceiling_factors(seen.spectral_radii, state.calm_radii, state.held_layers, case.kss.min_tau)
    if not factors:
        return None
    radius, widest = max((seen.spectral_radii[layer], layer) for layer in factors)
    tau = projection.largest_radius(widest, state.calm_radii, case.kss.min_tau)
    held = f"ceilings on what {_blocks(tuple(factors))}: block {widest} from spectral radius {radius:.3g} to {tau:.3g}"
    action = Action(
        kind="set_ceilings",
        reason=f"risk {case.risk.value:.2f}: {held}; {case.risk.reason}",
        ceilings=factors,
        corrects=not first,
        expires_in_steps=config.expires_in_steps,
    )
    # Without an answer, as in a dry run, the command counts as lost once it has expired.
    following = replace(state, held_layers=tuple(factors), shown_from=seen.step + config.expires_in_steps)
    if not first:
        return (action,), following, ""
    own = config.name == "kss"
    following = replace(
        following,
        kss_on_at=seen.step,
        loss_at_kss=seen.training.loss,
        acted_at=seen.step if own else state.acted_at,
        risk_at_action=case.risk.value if own else state.risk_at_action,
        phase="acting",
    )
    return (action,), following, ""


def _blocks(layers: tuple[int, ...]) -> str:
    """Name a few of the blocks that write."""
    if len(layers) == 1:
        return f"block {layers[0]} writes"
    if len(layers) > 4:
        return f"{len(layers)} blocks write"
    return f"blocks {', '.join(map(str, layers[:-1]))} and {layers[-1]} write"


def release_layers(case: Case) -> Proposal | None:
    """Release all layers once the run has been calm for `calm_steps`."""
    if not case.state.held_layers or not case.calm_for(case.kss.calm_steps):
        return None
    return _without_kss(case, f"calm for {case.kss.calm_steps} steps", phase=_phase_without_kss(case.state))
