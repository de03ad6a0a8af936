"""Token rows of the next snapshots, drawn together.

The first draw after a training step takes ten times as long as one that follows another, because the step has displaced
the generator's code from the processor's caches.
"""

from __future__ import annotations

import functools

from torch import Tensor

from koopmon.token_sampling import order_rows

MAX_AHEAD = 16
"""Snapshots whose rows are drawn together."""
MAX_ROWS = 1 << 14
"""Rows that are kept for them."""


class RowsAhead:
    """Rows of unmasked states, each equal to that of `order_rows`. A draw assumes that snapshots keep their interval.

    While the number of tokens or the interval changes from snapshot to snapshot, each has a draw of its own.
    """

    def __init__(self, seed: int, data_rank: int, num_samples: int) -> None:
        self._seed = seed
        self._data_rank = data_rank
        self._num_samples = num_samples
        self._num_tokens = 0
        self._step = 0
        """Step of the last snapshot."""
        self._stride = 0
        """Its distance from the one before."""
        self._drawn: dict[int, Tensor] = {}
        """Rows on the host, by the step."""

    def at(self, step: int, num_tokens: int) -> Tensor:
        """Return the rows of the snapshot at `step`, int64 on the host."""
        stride, same = step - self._step, num_tokens == self._num_tokens
        steady = same and stride == self._stride > 0
        if not same:
            self._drawn = {}
        self._num_tokens, self._step, self._stride = num_tokens, step, stride
        if step not in self._drawn:
            draw = functools.partial(order_rows, seed=self._seed, data_rank=self._data_rank)
            num_rows = min(self._num_samples, num_tokens)
            count = max(1, min(MAX_AHEAD, MAX_ROWS // num_rows)) if steady else 1
            steps = [step + number * stride for number in range(count)]
            self._drawn = {each: draw(num_tokens, self._num_samples, step=each)[0] for each in steps}
        return self._drawn.pop(step)
