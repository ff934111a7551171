"""Planning of runs before they start."""
