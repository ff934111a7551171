"""Benchmarks: lm-eval tasks, our suites, score differences and contamination."""
