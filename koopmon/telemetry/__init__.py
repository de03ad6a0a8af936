"""The tables of metrics and alerts, and the text exposition."""
