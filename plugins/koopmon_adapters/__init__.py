"""The architecture adapters that ship with koopmon. Each is loaded through its entry point, like third-party ones."""
