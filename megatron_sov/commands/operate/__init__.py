"""Commands that start, monitor and price runs."""
