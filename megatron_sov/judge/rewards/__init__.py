"""Rewards: verifiers, rules and judges that score a response or report why it cannot be scored.

Reinforcement learning, pass@k, synthesis and `megatron-sov score` use the same rewards. A failing judge or a
verifier that hangs yields no reward, which differs from a reward of 0.
"""
