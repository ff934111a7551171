"""Run settings, model families with their weight maps, and recipes (no torch)."""
