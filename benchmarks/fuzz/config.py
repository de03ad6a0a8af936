"""Target config: any bytes as a TOML file. A refusal must be one line."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.fuzz import check_line
from koopmon.config import Config, load
from koopmon.errors import ConfigError

_file = os.memfd_create("config")


def seeds() -> Iterator[bytes]:
    yield b'[policy]\nname = "lr"\nact_risk = 0.4\n[store]\nmax_bytes = 4_294_967_296\n'
    yield b'[model]\nadapter = "transformer"\nstack = "model.layers"\n[kss]\nthrough_shielded = true\n'
    yield b"[monitor]\nmax_runs = 0x40\nheartbeat_seconds = 1e0\n[limits]\nmin_lr_scale = nan\nmax_kss_alpha = inf\n"
    yield b"[cadence]\ncalm_every = 1979-05-27T07:32:00Z\n[[risk]]\na.b.c = [[[{x = 1}]]]\n"
    yield b'[risk]\n"\\u00e9\\n" = """\na\n"""\n'


def run(data: bytes) -> str:
    os.ftruncate(_file, 0)
    os.pwrite(_file, data, 0)
    try:
        found = load(f"/proc/self/fd/{_file}")
    except ConfigError as error:
        text = str(error)
        check_line(text)
        return "not TOML" if "not valid TOML" in text else "refused"
    assert isinstance(found, Config)
    return "taken"
