"""A request: checked, and opened, before anything is computed."""
