"""The cells of a sweep: what is missing, who computes it, what came out."""
