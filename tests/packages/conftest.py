"""Packages that tests install. Their own tests run there after the installation."""

collect_ignore_glob = ["*/tests"]
