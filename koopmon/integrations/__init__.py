"""Callbacks for trainers and mirrors for experiment trackers, built on `koopmon.attach()`."""
