"""Everything around real trainings broken on purpose; `python -m benchmarks.fault_campaign` runs it."""
