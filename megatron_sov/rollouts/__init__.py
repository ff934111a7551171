"""Rollout stores, shared by generation, reward and training: prompts, rows, parts. Without torch."""
