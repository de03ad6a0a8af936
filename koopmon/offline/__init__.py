"""Replay and calibration on recorded runs, without a monitor."""
