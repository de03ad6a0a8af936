"""The tables of metrics and alerts."""
