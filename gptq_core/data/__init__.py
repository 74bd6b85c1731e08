"""Text in, token windows out."""
