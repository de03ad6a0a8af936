"""Work on recorded runs, without a monitor."""
