"""What judges an answer: verifiers, rules and judges that give a response a reward, or say why there is none.

Reinforcement learning, pass@k, synthesis and `megatron-sov score` ask the same rewards.  A broken judge or a
verifier that hangs is told apart from a wrong answer: it leaves no reward, and never one of 0.
"""
