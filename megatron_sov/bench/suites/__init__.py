"""Benchmarks as task files over a user's own copy of the data: prompts, sampling, scorers, metrics."""
