"""State, logs and reports for run folders."""
