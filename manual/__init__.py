"""The site: what `mkdocs.yml` adds to the pages in docs/. Its reference is made from the code at every build."""
