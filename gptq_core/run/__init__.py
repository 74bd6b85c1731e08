"""Where model, method, format and hardware meet."""
