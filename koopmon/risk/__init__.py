"""Risk at initialisation and online risk, as pure functions of profiles."""
