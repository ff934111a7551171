"""Rollout stores, which generation, reward and training share: prompts, rows, parts. Does not import
torch."""
