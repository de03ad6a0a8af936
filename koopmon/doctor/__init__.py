"""Why is my job not seen: each check is bounded in time, harmless to a monitor in use, and ends in findings."""
