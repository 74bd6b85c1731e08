"""One decoder block through the method."""
