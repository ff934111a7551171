"""HTML reports on runs."""
