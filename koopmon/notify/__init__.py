"""Notifications by webhook and e-mail, from threads that never block the monitor."""
