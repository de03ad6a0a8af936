"""Dashboards and alert rules for Prometheus and Grafana, made of the tables of metrics and alerts."""
