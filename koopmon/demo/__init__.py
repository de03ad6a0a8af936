"""The demonstration: one real training, unguarded and guarded, side by side."""
