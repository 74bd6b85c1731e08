"""Servers and schedules: pages, deployments, and runs whose process died."""
