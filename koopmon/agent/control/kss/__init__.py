"""Koopman Spectral Shaping, an action that is off unless the policy asks for it."""
