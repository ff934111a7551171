"""Score responses: rewards and tool environments."""
