"""The live page: what the monitor knows of its runs, for people with a browser; docs/live-page.md. It only reads."""
