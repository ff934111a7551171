"""Machine checks."""
