"""Fixtures of the monitor's tests: a running monitor writes a history."""

from __future__ import annotations

from tests.monitor.conftest import connect, start_process, store_path

__all__ = ["connect", "start_process", "store_path"]
