"""Many configs judged from one capture."""
