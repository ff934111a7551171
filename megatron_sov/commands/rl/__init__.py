"""Commands for reinforcement learning: `rl`, `ssp` and `tools`."""
