"""Diagnosis of a job that the monitor does not show.

Each check is bounded in time and does not disturb a monitor in use. It returns findings.
"""
