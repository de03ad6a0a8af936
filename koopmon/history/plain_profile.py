"""A profile as plain columns, and its compact form in a history. Reading needs neither torch nor numpy.

A packed profile is the byte FORMAT, then zlib data of one msgpack array (`_Packed`). Its numbers are float32, column by
column, and those that are not shares have 16 bits of mantissa. Its eigenvalues are 11-bit fractions of the layer's
spectral radius; of a conjugate pair only the first is there. The bytes of equal weight stand together, which compresses
better.

Earlier versions of koopmon wrote zlib data of JSON, which begins with another byte.
"""

from __future__ import annotations

import math
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Self

import msgspec
from msgspec import Meta

from koopmon.wire.messages import MAX_LAYERS

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

Observables = Mapping[str, Sequence[float | None]]
"""Observables by name, one value per transition."""

FORMAT = b"\x01"
"""First byte of a packed profile. The first byte of zlib data is another one."""
STEPS = 1023
"""Number of steps from 0 to the spectral radius, in which parts of eigenvalues are counted."""
MAX_FLOAT = float.fromhex("0x1.fffep127")
"""Largest float32 with 16 bits of mantissa."""
MAX_PACKED_BYTES = 64 << 20
"""Maximum size in bytes of one unpacked profile."""
MAX_JSON_BYTES = 256 << 20
"""The same for the JSON of earlier versions."""
MAX_EIGENVALUES = 1 << 16
"""Maximum number of eigenvalues of one layer."""
_SHARE, _POSITIVE = (0.0, 1.0), (0.0, sys.float_info.max)
QUANTITIES: Mapping[str, tuple[float, float]] = {
    "near_unit_mass": _SHARE,
    "expansive_mass": _SHARE,
    "contractive_mass": _SHARE,
    "spectral_radius": _POSITIVE,
    "eigenvector_condition_number": _POSITIVE,
    "kreiss_constant": _POSITIVE,
    "nonlinearity_ratio": _POSITIVE,
    "update_ratio": _POSITIVE,
    "update_exponent": (-sys.float_info.max, sys.float_info.max),
    "reliable_mode_ratio": _SHARE,
    "reliable_near_unit_mass": _SHARE,
    "stream_rms": _POSITIVE,
}
"""Numbers of a layer with their bounds, in the order of the packed form: the fields of a `LayerProfile`."""

_Text = Annotated[str, Meta(max_length=4096)]
_Count = Annotated[int, Meta(ge=0, le=MAX_EIGENVALUES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainProfile:
    """Profiles of L transitions, column by column."""

    columns: Mapping[str, tuple[float | None, ...]]
    """L values of each of QUANTITIES; None where one was not computed."""
    eigenvalues: tuple[array[float], ...]
    """Eigenvalues of each layer, flat: real part, imaginary part, and so on."""
    informative: tuple[bool, ...]
    """True for each layer whose samples determine the spectrum."""
    reasons: tuple[str, ...]
    """Reason against each informative layer, or a caution; empty without either."""
    num_samples: int
    svd_rank: int | None
    is_informative: bool
    """True for a profile that is informative as a whole."""
    reason: str
    """Reasons of all layers."""

    @property
    def num_layers(self) -> int:
        return len(self.informative)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, estimated."""
        return sum(4 * len(flat) for flat in self.eigenvalues) + 32 * len(QUANTITIES) * self.num_layers

    @classmethod
    def of(cls, profile: SpectralProfile) -> Self:
        # Imported late: readers do not need it.
        import numpy as np

        layers = profile.layers
        return cls(
            columns={name: tuple(map(attrgetter(name), layers)) for name in QUANTITIES},
            eigenvalues=tuple(array("f", layer.eigenvalues.numpy().astype(np.complex64).tobytes()) for layer in layers),
            informative=tuple(layer.informative for layer in layers),
            reasons=tuple(layer.reason for layer in layers),
            num_samples=profile.num_samples,
            svd_rank=profile.svd_rank,
            is_informative=profile.informative,
            reason=profile.reason,
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to the argument of `SpectralProfile.from_dict`; unknown numbers are left out."""
        layers = []
        for index, flat in enumerate(self.eigenvalues):
            numbers = {name: column[index] for name, column in self.columns.items()}
            layers.append(
                {name: value for name, value in numbers.items() if value is not None or name == "kreiss_constant"}
                | {
                    "eigenvalues": list(zip(flat[::2], flat[1::2], strict=True)),
                    "num_samples": self.num_samples,
                    "svd_rank": self.svd_rank,
                    "informative": self.informative[index],
                    "reason": self.reasons[index],
                }
            )
        return {"layers": layers, "informative": self.is_informative, "reason": self.reason}


class _JsonLayer(msgspec.Struct):
    """One layer in the JSON of earlier versions, some of which lack numbers."""

    eigenvalues: list[tuple[float, float]]
    num_samples: int
    informative: bool
    reason: str = ""
    svd_rank: int | None = None
    near_unit_mass: float | None = None
    expansive_mass: float | None = None
    contractive_mass: float | None = None
    spectral_radius: float | None = None
    eigenvector_condition_number: float | None = None
    kreiss_constant: float | None = None
    nonlinearity_ratio: float | None = None
    update_ratio: float | None = None
    update_exponent: float | None = None
    reliable_mode_ratio: float | None = None
    reliable_near_unit_mass: float | None = None
    stream_rms: float | None = None


class _Json(msgspec.Struct):
    layers: Annotated[list[_JsonLayer], Meta(max_length=MAX_LAYERS)] = []
    informative: bool = False
    reason: str = ""
    observables: dict[str, list[float | None]] = {}


class _Packed(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The packed form. Without `counts` it holds observables only."""

    observables: dict[str, list[float | None]]
    counts: Annotated[list[_Count], Meta(max_length=MAX_LAYERS)] = []
    """Number of eigenvalues of each layer."""
    num_samples: Annotated[int, Meta(ge=0, le=1 << 53)] = 0
    svd_rank: Annotated[int, Meta(ge=0, le=1 << 53)] | None = None
    informative: list[bool] = []
    reasons: list[_Text] = []
    is_informative: bool = False
    reason: str = ""
    numbers: bytes = b""
    halved: bool = False
    """True if the second value of each conjugate pair is left out."""
    eigenvalues: bytes = b""


def pack(profile: PlainProfile | None, observables: Observables | None) -> bytes | None:
    """Encode a profile and the observables of the model family; None without either."""
    if profile is None and not observables:
        return None
    packed = _Packed({name: list(values) for name, values in (observables or {}).items()})
    if profile is not None:
        numbers, halved, eigenvalues = _compact(profile)
        packed = _Packed(
            observables=packed.observables,
            counts=[len(flat) // 2 for flat in profile.eigenvalues],
            num_samples=profile.num_samples,
            svd_rank=profile.svd_rank,
            informative=list(profile.informative),
            reasons=[reason[:4096] for reason in profile.reasons],
            is_informative=profile.is_informative,
            reason=profile.reason,
            numbers=numbers,
            halved=halved,
            eigenvalues=eigenvalues,
        )
    return FORMAT + zlib.compress(msgspec.msgpack.encode(packed), 1)


def unpack(
    data: bytes | None, *, non_finite: bool, eigenvalues: bool = True
) -> tuple[PlainProfile | None, dict[str, list[float | None]]]:
    """Return the profile, None when the states were not finite, and the observables.

    Without `eigenvalues`, the profile has none, which takes a third of the time.
    Raises zlib.error, msgspec.MsgspecError, TypeError or ValueError for bytes that are not a packed profile of this
    version or an earlier one, and for numbers out of their bounds.
    """
    if data is None:
        return None, {}
    if data[:1] != FORMAT:
        known = msgspec.json.decode(_inflated(data, MAX_JSON_BYTES), type=_Json)
        return None if non_finite else _of_json(known), known.observables
    packed = msgspec.msgpack.decode(_inflated(data[1:], MAX_PACKED_BYTES), type=_Packed)
    return None if non_finite else _profile(packed, eigenvalues=eigenvalues), packed.observables


def _of_json(known: _Json) -> PlainProfile:
    layers = known.layers
    if not layers:
        raise ValueError("a profile has no layers")
    return PlainProfile(
        columns=_checked({name: [getattr(layer, name) for layer in layers] for name in QUANTITIES}),
        eigenvalues=tuple(_flat(layer.eigenvalues) for layer in layers),
        informative=tuple(layer.informative for layer in layers),
        reasons=tuple(layer.reason for layer in layers),
        num_samples=layers[0].num_samples,
        svd_rank=layers[0].svd_rank,
        is_informative=known.informative,
        reason=known.reason,
    )


def _profile(packed: _Packed, *, eigenvalues: bool) -> PlainProfile:
    count = len(packed.counts)
    numbers = array("f", _interleaved(packed.numbers, 4))
    if not count or not len(packed.informative) == len(packed.reasons) == count:
        raise ValueError("a profile has no layers, or not the same number everywhere")
    if len(numbers) != count * len(QUANTITIES):
        raise ValueError(f"a profile has {len(numbers)} numbers, expected {count * len(QUANTITIES)}")
    columns = _checked(
        {
            name: [None if value != value else value for value in numbers[place * count : (place + 1) * count]]
            for place, name in enumerate(QUANTITIES)
        }
    )
    return PlainProfile(
        columns=columns,
        eigenvalues=_eigenvalues(packed, columns["spectral_radius"]) if eigenvalues else (),
        informative=tuple(packed.informative),
        reasons=tuple(packed.reasons),
        num_samples=packed.num_samples,
        svd_rank=packed.svd_rank,
        is_informative=packed.is_informative,
        reason=packed.reason,
    )


def _compact(profile: PlainProfile) -> tuple[bytes, bool, bytes]:
    """Return the numbers, True if conjugates are left out, and the eigenvalues."""
    import numpy as np

    rows = [profile.columns[name] for name in QUANTITIES]
    numbers = np.array(rows, dtype=np.float64).clip(-MAX_FLOAT, MAX_FLOAT).astype(np.float32)
    # A share is one of few fractions, which compress well and stay as they are.
    rounded = [place for place, bounds in enumerate(QUANTITIES.values()) if bounds is not _SHARE]
    bits = numbers.view(np.uint32)
    bits[rounded] = (bits[rounded] + np.uint32(0x80)) & np.uint32(0xFFFFFF00)
    radius = numbers[list(QUANTITIES).index("spectral_radius")].astype(np.float64)
    counts = [len(flat) // 2 for flat in profile.eigenvalues]
    parts = np.frombuffer(b"".join(flat.tobytes() for flat in profile.eigenvalues), np.float32).reshape(-1, 2)
    unit = np.repeat(np.where(radius > 0.0, radius, 1.0), counts)[:, None]
    steps = np.rint(np.nan_to_num(parts / unit).clip(-1.0, 1.0) * STEPS).astype(np.int16)
    # A small imaginary part stays positive, so that a pair stays a pair.
    steps[:, 1] = np.where(parts[:, 1] > 0.0, np.maximum(steps[:, 1], 1), steps[:, 1])
    first, second = parts[:, 1] > 0.0, parts[:, 1] < 0.0
    before, begins = np.roll(parts, 1, axis=0), np.cumsum([0, *counts[:-1]])
    halved = bool(
        (np.roll(first, 1) == second).all()
        and (parts[second] == before[second] * (1.0, -1.0)).all()
        and not second[begins[begins < len(second)]].any()
    )
    if halved:
        steps = steps[parts[:, 1] >= 0.0]
    # Real parts come before imaginary ones.
    return _by_weight(numbers.tobytes(), 4), halved, _by_weight(steps.T.tobytes(), 2)


def _eigenvalues(packed: _Packed, radii: Sequence[float | None]) -> tuple[array[float], ...]:
    steps = array("h", _interleaved(packed.eigenvalues, 2))
    if len(steps) % 2 or max(steps, default=0) > STEPS or min(steps, default=0) < -STEPS:
        raise ValueError("an eigenvalue is larger than the spectral radius")
    half = len(steps) // 2
    found, at = [], 0
    for count, radius in zip(packed.counts, radii, strict=True):
        unit = (radius or 1.0) / STEPS
        flat: list[float] = []
        while len(flat) < 2 * count and at < half:
            real, imaginary = unit * steps[at], unit * steps[half + at]
            flat += (real, imaginary)
            if packed.halved and imaginary > 0.0:
                flat += (real, -imaginary)
            at += 1
        if len(flat) != 2 * count:
            raise ValueError("a profile has another number of eigenvalues than its counts")
        found.append(array("f", flat))
    if at != half:
        raise ValueError("a profile has more eigenvalues than its counts")
    return tuple(found)


def _checked(columns: Mapping[str, Sequence[float | None]]) -> dict[str, tuple[float | None, ...]]:
    """Return the columns. Raises ValueError for a number out of its bounds, NaN among them."""
    for name, values in columns.items():
        low, high = QUANTITIES[name]
        for value in values:
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} = {value}: allowed are {low:g} to {high:g}")
    return {name: tuple(values) for name, values in columns.items()}


def _flat(pairs: Iterable[tuple[float, float]]) -> array[float]:
    flat = array("f", list(chain.from_iterable(pairs)))  # twice as fast as from the iterator
    if not all(map(math.isfinite, flat)):
        flat = array("f", [min(max(each, -MAX_FLOAT), MAX_FLOAT) for each in flat])
    return flat


def _by_weight(data: bytes, size: int) -> bytes:
    """Return the first bytes of all numbers of `size` bytes, then the second ones, and so on."""
    return b"".join(data[place::size] for place in range(size))


def _interleaved(data: bytes, size: int) -> bytes:
    """Undo `_by_weight`. Raises ValueError for a part of a number."""
    count, rest = divmod(len(data), size)
    if rest:
        raise ValueError("a profile ends inside a number")
    numbers = bytearray(len(data))
    for place in range(size):
        numbers[place::size] = data[place * count : (place + 1) * count]
    return bytes(numbers)


def _inflated(data: bytes, limit: int) -> bytes:
    inflate = zlib.decompressobj()
    text = inflate.decompress(data, limit)
    if not inflate.eof:
        raise ValueError(f"packed values end early or exceed {limit} bytes")
    return text
