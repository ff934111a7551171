"""Tool environments: typed tools, a state with a verifiable goal, and episodes played by a model.

Reinforcement learning, synthesis and `megatron-sov tools run` use the same environments.
"""
