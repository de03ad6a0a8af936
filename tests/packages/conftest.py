"""Packages that tests install; their own tests run there, with them installed."""

collect_ignore_glob = ["*/tests"]
