"""What a run and a sweep are asked for, as frozen schemas."""
