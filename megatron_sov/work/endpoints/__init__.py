"""OpenAI-compatible endpoints: requests with retries, limits, costs, and answers kept by what was asked.

Judges of `rewards`, `megatron-sov eval lm` and `sov-data synth` ask through it.
"""
