"""Views of a run: frozen records, and their rendering as HTML and SVG."""
