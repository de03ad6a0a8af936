"""Whitened DMD profiles of the residual stream, and Koopman Spectral Shaping.

The package imports torch and koopmon.errors only. It takes plain arguments, reads no configuration and does no I/O.
Rows are samples: x and y have the shape (N, D). The source of the equations is arXiv 2602.22988.
"""

from koopmon.spectral.kss import CONDITION_GUARD, KssGradient, kss_basis, kss_gradient, kss_loss
from koopmon.spectral.nonnormality import kreiss_constant
from koopmon.spectral.profile import MIN_UPDATE_RATIO, profile_in_batches, profile_states, profile_transition
from koopmon.spectral.profiles import FIELDS, LayerProfile, SpectralProfile, Thirds
from koopmon.spectral.update_exponent import LARGEST_EXPONENT, has_equal_lengths, stack_exponent, update_exponent
from koopmon.spectral.whitening import NonFiniteError

__all__ = [
    "CONDITION_GUARD",
    "FIELDS",
    "LARGEST_EXPONENT",
    "MIN_UPDATE_RATIO",
    "KssGradient",
    "LayerProfile",
    "NonFiniteError",
    "SpectralProfile",
    "Thirds",
    "has_equal_lengths",
    "kreiss_constant",
    "kss_basis",
    "kss_gradient",
    "kss_loss",
    "profile_in_batches",
    "profile_states",
    "profile_transition",
    "stack_exponent",
    "update_exponent",
]
