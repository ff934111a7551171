"""Turn judged responses into training data: groups, pairs, KTO records, trajectories."""
