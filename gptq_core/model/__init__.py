"""What a model is made of, and the model around its blocks."""
