"""Use one thread for linear algebra, also in numpy, because the tests run in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

try:
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError:  # part of the extra `dev`; without it numpy uses its own number of threads
    threadpool_limits = nullcontext


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)
