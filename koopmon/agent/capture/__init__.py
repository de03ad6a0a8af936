"""Block states and local signals, taken into a snapshot."""
