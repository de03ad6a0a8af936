"""The architecture adapters that ship with koopmon, each loaded through its entry point like anyone else's."""
