"""Judged responses as training data: groups, pairs, single ones, trajectories."""
