"""Risk: pure functions of profiles."""
