"""Inputs that the `rl` commands share: prompts, environments, teachers."""
