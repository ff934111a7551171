"""Where a model acts: environments of typed tools, a state and a goal that can be checked, and the episodes
that a model plays in them.

Reinforcement learning, synthesis and `megatron-sov tools run` play the same environments.
"""
