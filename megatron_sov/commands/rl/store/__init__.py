"""Commands on rollout stores and tool environments: `rl reward`, `rl store`, `tools`."""
