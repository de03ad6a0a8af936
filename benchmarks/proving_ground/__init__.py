"""Normalised language models on real text, at learning rates from usual to ruinous."""
