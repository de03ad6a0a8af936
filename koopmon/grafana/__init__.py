"""Dashboards and alert rules for Prometheus and Grafana, generated from the tables of metrics and alerts."""
