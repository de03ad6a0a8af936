"""The monitor's HTTP server: metrics, health, pages, event stream, JSON API."""
