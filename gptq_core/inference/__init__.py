"""A checkpoint at work: its linears, its numbers, and back to a dense model."""
