"""Injected faults around real trainings; `python -m benchmarks.fault_campaign` runs the campaign."""
