"""The daemon: snapshots to spectra, spectra to metrics and decisions, decisions to commands."""
