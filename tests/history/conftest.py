"""Fixtures of the monitor's tests: a history is written by a running monitor."""

from __future__ import annotations

from tests.monitor.conftest import connect, start_process, store_path

__all__ = ["connect", "start_process", "store_path"]
