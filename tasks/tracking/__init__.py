"""Runs, sweeps and versions in MLflow."""
