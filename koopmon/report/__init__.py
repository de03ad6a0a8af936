"""What happened in a recorded run, as facts, as words and as one page."""
