"""Measures of a checkpoint beside its original, and what the difference is worth."""
