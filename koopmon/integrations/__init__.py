"""Callbacks and mirrors for other people's trainers and trackers, over `koopmon.attach()`."""
