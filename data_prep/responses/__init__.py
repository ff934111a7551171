"""Turn judged responses into training data: groups, pairs, trajectories."""
