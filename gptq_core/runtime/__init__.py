"""What the process does beside the work: time by stage, memory kept and given back."""
