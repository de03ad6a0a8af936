"""Device of the engine: an unused CUDA device, else the CPU."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Iterable

import torch

from koopmon.errors import ConfigError

logger = logging.getLogger(__name__)

SPARE_MEMORY_MIB = 512
"""A device with more memory in use than this counts as occupied."""
QUERY = ("nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits")


def check_device(name: str) -> str:
    """Return `name` if it is "auto", "cpu" or a present CUDA device. Raises ConfigError otherwise."""
    if name in {"auto", "cpu"}:
        return name
    match = re.fullmatch(r"cuda:(\d{1,3})", name)
    count = torch.cuda.device_count()
    if match and int(match[1]) < count:
        return name
    present = f"cuda:0 to cuda:{count - 1}" if count else "no CUDA device is present"
    raise ConfigError(f"device = {name!r}: allowed are auto, cpu and cuda:N ({present})")


def choose_device(name: str) -> torch.device:
    """Return the device for `name`.

    Resolve "auto" after training has started: before that, every device is unused.
    """
    if name != "auto":
        return torch.device(name)
    return _spare_cuda_device() or torch.device("cpu")


def num_cpu_threads() -> int:
    """Number of CPU threads for linear algebra: one per 16 cores, at least 1 and at most 4."""
    return max(1, min(4, (os.cpu_count() or 1) // 16))


def _spare_cuda_device() -> torch.device | None:
    # A query of free memory through CUDA would create a context, which uses memory, on every device.
    if torch.cuda.device_count() == 0:
        return None
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("device auto: nvidia-smi gave no answer (%s), computing on the CPU", error)
        return None
    used = dict(_memory_used(answer.splitlines()))
    spare = []
    for index in range(torch.cuda.device_count()):
        memory = used.get(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        if memory is not None and memory <= SPARE_MEMORY_MIB:
            spare.append((memory, index))
    return torch.device("cuda", min(spare)[1]) if spare else None


def _memory_used(lines: Iterable[str]) -> Iterable[tuple[str, int]]:
    for line in lines:
        uuid, _, memory = line.partition(",")
        if memory.strip().isdigit():
            yield uuid.strip(), int(memory)
