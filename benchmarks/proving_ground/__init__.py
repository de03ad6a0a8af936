"""Normalised language models on real text, at learning rates from right to ruinous."""
