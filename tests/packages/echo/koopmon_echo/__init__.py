"""Echo networks, and their adapter for koopmon."""
