"""Inputs that commands of reinforcement learning share: prompts, environments, teachers."""
