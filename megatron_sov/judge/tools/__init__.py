"""Where a model acts: environments of typed tools, a state and a goal that can be checked, and the episodes
that a model plays in them.

Reinforcement learning, synthesis and evaluation play the same environments; `megatron-sov tools play` tries
them by hand.
"""
