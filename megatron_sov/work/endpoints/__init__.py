"""Client for OpenAI-compatible endpoints with retries, rate and cost limits, and a cache keyed by request.

Used by reward judges, `megatron-sov eval lm` and `sov-data synth`.
"""
