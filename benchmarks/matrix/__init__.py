"""Support matrix of training layouts; `python -m benchmarks.matrix` runs it."""
