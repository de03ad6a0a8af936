"""Profiles of layer transitions: the spectrum of the residual stream by layer (arXiv 2602.22988, eqs. 4-13 and 29).

Rows are samples: a state has the shape (N samples, D width). All states hold the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from koopmon.spectral.dmd import Operators, fit
from koopmon.spectral.nonnormality import kreiss_constant
from koopmon.spectral.profiles import FIELDS, LayerProfile, SpectralProfile
from koopmon.spectral.update_exponent import update_exponent
from koopmon.spectral.whitening import (
    Coordinates,
    centre,
    coordinates,
    ends,
    in_safe_range,
    largest_magnitudes,
    product_dtype,
)

EXPANSIVE = 1.05
"""Modulus above which a mode is expansive, and the upper end of the near-unit band (eqs. 11-12; the paper's value)."""
NEAR_UNIT = 0.90
"""Lower end of the near-unit band (eq. 12; the paper's value)."""
CONTRACTIVE = 0.80
"""Modulus below which a mode is contractive (eq. 13; the paper's value)."""
RELIABLE = 0.1
"""Largest residual of a reliable mode (eq. 10; the paper's value)."""

MIN_PRESENT = 0.9
"""Smallest share of present directions in an informative layer. A LayerNorm removes one direction. Chosen by hand."""

MIN_UPDATE_RATIO = 0.01
"""Smallest update ratio of an informative layer. Below it the spectrum shows the identity initialisation only.

The root mean square of |lambda - 1| is at most the update ratio. The near-unit band holds all modes with
|lambda - 1| <= 0.05. At a ratio of 0.01 at most (0.01 / 0.05)^2 = 4% of the modes lie outside.
"""

KREISS_FULL_RANK = 256
"""Largest number of directions for which `kreiss="auto"` computes the Kreiss constant. It limits the cost."""
_BATCH_ELEMENTS = 1 << 22
"""Bound on the elements of x in a batch of layers: 2^22 float32 values are 16 MiB. Larger batches are slower on a CPU.
"""

Kreiss = Literal["auto", "always", "never"]


def profile_transition(
    x: Tensor, y: Tensor, *, svd_rank: int | None = None, ridge: float = 1e-5, seed: int = 0, kreiss: Kreiss = "auto"
) -> LayerProfile:
    """Profile one transition from x to y, both (N, D). Arguments and errors are those of `profile_states`."""
    return _finish(_profile([x, y], ["x", "y"], svd_rank, ridge, seed, kreiss, paired=False)).layers[0]


def profile_states(
    states: Tensor | Sequence[Tensor],
    *,
    svd_rank: int | None = None,
    ridge: float = 1e-5,
    seed: int = 0,
    kreiss: Kreiss = "auto",
    paired: bool = False,
) -> SpectralProfile:
    """Profile the L transitions among L+1 states (arXiv 2602.22988, eqs. 4-13 and 29).

    Constant, rank-deficient or too few samples raise no error. The layer is then not `informative` and has a `reason`.

    Args:
        states: a tensor (L+1, N, D) or a sequence of L+1 tensors (N, D), with the same N tokens at every depth and on
            one device. Half precision becomes float32.
        svd_rank: None fits the full D-dimensional operator in float64; it needs N >= D, and 1.2 D is comfortable. An
            integer R >= 1 fits the leading R directions of each x from a randomised SVD; it needs N > R, and 1.2 R is
            comfortable.
        ridge: eps of eq. 6, at least 0, in units of the states' variance. It enters the whitening map only. The
            default 1e-5 is the paper's.
        seed: seed of the private generator of the randomised SVD.
        kreiss: "auto" computes the Kreiss constant up to 256 directions, "always" at any size, "never" not at all.
        paired: True for 2L states, the input and the output of each of L blocks, where a model mixes between blocks.

    Returns:
        The profile, one layer for each transition.

    Raises:
        ValueError: a state holds NaN or infinite values, or an argument is not allowed; the message holds its name.
    """
    profiling = profile_in_batches(states, svd_rank=svd_rank, ridge=ridge, seed=seed, kreiss=kreiss, paired=paired)
    return _finish(profiling)


def profile_in_batches(
    states: Tensor | Sequence[Tensor],
    *,
    svd_rank: int | None = None,
    ridge: float = 1e-5,
    seed: int = 0,
    kreiss: Kreiss = "auto",
    paired: bool = False,
) -> Generator[None, None, SpectralProfile]:
    """Profile as `profile_states` does, and yield between batches of layers; a batch has a bounded size.

    Returns:
        The profile, as the value of the generator's StopIteration.
    """
    names = [f"states[{index}]" for index in range(len(states))]
    return _profile(states, names, svd_rank, ridge, seed, kreiss, paired=paired)


def _finish(profiling: Generator[None, None, SpectralProfile]) -> SpectralProfile:
    while True:
        try:
            next(profiling)
        except StopIteration as end:
            return cast(SpectralProfile, end.value)


def _profile(
    states: Tensor | Sequence[Tensor],
    names: list[str],
    svd_rank: int | None,
    ridge: float,
    seed: int,
    kreiss: Kreiss,
    *,
    paired: bool,
) -> Generator[None, None, SpectralProfile]:
    """Check the arguments and profile the states in batches; `names` are for error messages."""
    each = list(states)
    _check(each, names, svd_rank, ridge, kreiss)
    if paired and len(each) % 2:
        raise ValueError(f"states: {len(each)} given, pairs need an even number")
    num_samples, width = each[0].shape
    size = width if svd_rank is None else min(svd_rank, width)
    dtype = product_dtype(*each) if size < width else torch.float64
    device = each[0].device.type
    with torch.autocast(device, enabled=False):
        magnitudes = largest_magnitudes([state.detach() for state in each], names)
    stride, more = (2, 0) if paired else (1, 1)
    num_layers = len(each) // stride - more
    batch = max(1, _BATCH_ELEMENTS // max(1, num_samples * width))
    starts, stops = ends(paired=paired)
    layers: list[LayerProfile] = []
    for first in range(0, num_layers, batch):
        if first:
            yield
        part = slice(stride * first, stride * (first + batch) + more)
        # The modes belong to the thread, so they must not be in force while the generator waits.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            chunk = states[part] if isinstance(states, Tensor) else torch.stack(each[part])
            chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
            exact = chunk if all(map(in_safe_range, magnitudes[part])) else chunk.double()
            exponents: list[float] = update_exponent(exact[starts], exact[stops]).tolist()
            sizes: list[float] = _rms(exact[stops]).tolist()
            centred = centre(chunk, magnitudes[part], dtype)
            found: dict[int, LayerProfile] = {}
            for group in coordinates(centred.part(starts), centred.part(stops), size, ridge, seed):
                mine = [exponents[layer] for layer in group.layers]
                found.update(zip(group.layers, _fit(group, mine, size, svd_rank, kreiss), strict=True))
        layers += [replace(found[layer], stream_rms=sizes[layer]) for layer in sorted(found)]
    return SpectralProfile(layers=tuple(layers))


def _rms(states: Tensor) -> Tensor:
    """Return the root mean square of each state of (L, N, D), (L,) in float64: squares of float32 could overflow."""
    norms: Tensor = torch.linalg.vector_norm(states, dim=(-2, -1), dtype=torch.float64)
    return (norms / math.sqrt(states[0].numel())).nan_to_num()


def _check(states: Sequence[Tensor], names: list[str], svd_rank: int | None, ridge: float, kreiss: Kreiss) -> None:
    """Raise ValueError for the first argument that is not allowed."""
    if len(states) < 2:
        raise ValueError(f"states: {len(states)} given, at least 2 are needed for one transition")
    for state, name in zip(states, names, strict=True):
        if state.dim() != 2 or state.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(state.shape)}; a state is (N samples, D width), D at least 1")
        if not state.is_floating_point():
            raise ValueError(f"{name} has dtype {state.dtype}; a state is a real floating-point tensor")
        for what in ("shape", "device"):
            if getattr(state, what) != getattr(states[0], what):
                raise ValueError(f"{name} has {what} {getattr(state, what)}, {names[0]} has {getattr(states[0], what)}")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank = {svd_rank}: allowed are None (full rank) and integers from 1")
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge = {ridge}: allowed are finite numbers from 0")
    if kreiss not in ("auto", "always", "never"):
        raise ValueError(f"kreiss = {kreiss!r}: allowed are 'auto', 'always' and 'never'")


def _fit(
    group: Coordinates, exponents: list[float], size: int, svd_rank: int | None, kreiss: Kreiss
) -> list[LayerProfile]:
    """Profile transitions with equal numbers of directions; `exponents` holds their update exponents."""
    num_layers, num_samples, directions = group.x.shape
    if directions == 0:
        return [_empty(num_samples, exponent, size, svd_rank) for exponent in exponents]
    operators = fit(group.x, group.y, group.spread, group.ridge)
    wanted = kreiss == "always" or (kreiss == "auto" and directions <= KREISS_FULL_RANK)
    constants = (
        kreiss_constant(operators.operator, (operators.eigenvalues, operators.vectors)).tolist()
        if wanted
        else [None] * num_layers
    )
    columns = _columns(operators)
    profiles = []
    for row, eigenvalues in enumerate(operators.eigenvalues.cpu()):
        numbers = {name: values[row] for name, values in columns.items()}
        finite = bool(numbers.pop("finite"))
        flaw, caution = _verdict(num_samples, directions, size, svd_rank, numbers["update_ratio"], finite)
        profiles.append(
            LayerProfile(
                eigenvalues=eigenvalues,
                kreiss_constant=constants[row],
                update_exponent=exponents[row],
                num_samples=num_samples,
                svd_rank=svd_rank,
                informative=not flaw,
                reason=flaw or caution,
                **numbers,
            )
        )
    return profiles


def _columns(operators: Operators) -> dict[str, list[float]]:
    """Compute the numbers of `LayerProfile` that come from the operators, and `finite`: one list entry for each layer.

    The function waits for the device once.
    """
    modulus = operators.eigenvalues.abs()
    near_unit = (modulus >= NEAR_UNIT) & (modulus <= EXPANSIVE)
    reliable = operators.residuals <= RELIABLE
    # Every field is finite. Overflow gives the largest float64, and `finite` makes the layer not informative.
    largest = torch.finfo(torch.float64).max
    columns = {
        "near_unit_mass": near_unit.double().mean(-1),
        "expansive_mass": (modulus > EXPANSIVE).double().mean(-1),
        "contractive_mass": (modulus < CONTRACTIVE).double().mean(-1),
        "spectral_radius": modulus.amax(-1),
        "eigenvector_condition_number": operators.condition,
        "nonlinearity_ratio": operators.nonlinearity.nan_to_num(nan=largest),
        "update_ratio": operators.update.nan_to_num(nan=largest),
        "reliable_mode_ratio": reliable.double().mean(-1),
        "reliable_near_unit_mass": (near_unit & reliable).sum(-1).double() / reliable.sum(-1).clamp_min(1),
        "finite": operators.finite.double(),
    }
    return dict(zip(columns, torch.stack(list(columns.values())).tolist(), strict=True))


def _verdict(
    num_samples: int, present: int, size: int, svd_rank: int | None, update_ratio: float, finite: bool
) -> tuple[str, str]:
    """Return the reason against an informative layer, or "", and a caution, or ""; `present` of `size` directions."""
    # A comfortable number of samples is 20% above the number of directions. The 20% were chosen by hand.
    comfortable = math.ceil(1.2 * size)
    # With N = R centred samples the truncated fit has no residual: centring leaves N - 1 degrees of freedom.
    if num_samples < size or (svd_rank is not None and num_samples <= size):
        need = f"full rank needs N >= D = {size}" if svd_rank is None else f"svd_rank {svd_rank} needs N > {size}"
        return f"too few samples: N = {num_samples}, {need}, comfortably {comfortable}", ""
    if present == 0:
        return "constant input", ""
    missing = f"{present} of {size} directions present" if present < size else ""
    if present < MIN_PRESENT * size:
        return f"rank-deficient input: {missing}", ""
    if not finite:
        return "values overflow", ""
    if update_ratio < MIN_UPDATE_RATIO:
        return f"uninformative until layers move: update ratio below {MIN_UPDATE_RATIO}", ""
    few = f"few samples: N = {num_samples}, comfortably {comfortable}" if num_samples < comfortable else ""
    return "", "; ".join(filter(None, (missing, few)))


def _empty(num_samples: int, exponent: float, size: int, svd_rank: int | None) -> LayerProfile:
    """Build the profile of a layer whose samples have no spread and therefore no modes."""
    flaw, _ = _verdict(num_samples, 0, size, svd_rank, 0.0, True)
    numbers: dict[str, Any] = dict.fromkeys(FIELDS, 0.0)
    numbers |= {"eigenvector_condition_number": 1.0, "kreiss_constant": None, "update_exponent": exponent}
    return LayerProfile(
        eigenvalues=torch.zeros(0, dtype=torch.complex128, device="cpu"),
        num_samples=num_samples,
        svd_rank=svd_rank,
        informative=False,
        reason=flaw,
        **numbers,
    )
