"""The support matrix: what is proven in which manner of training; `python -m benchmarks.matrix` runs it."""
