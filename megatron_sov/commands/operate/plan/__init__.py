"""Plans for runs before they start."""
