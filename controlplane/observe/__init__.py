"""Watching it: logs, metrics, traces."""
