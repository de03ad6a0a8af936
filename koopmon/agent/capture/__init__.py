"""Snapshots of block states and local signals."""
