"""Commands of reinforcement learning, of tools, of probing and fusing."""
