"""The store of generation, reward and training jobs: prompts, rollouts, rewards, claims. Does not import
torch."""
