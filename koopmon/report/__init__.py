"""Report of a recorded run: as data, as text, and as one HTML page."""
