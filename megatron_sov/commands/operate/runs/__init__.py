"""State, logs and reports of run folders."""
