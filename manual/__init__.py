"""Generators: reference pages at each build of the site, and the files of `python -m manual.write`."""
