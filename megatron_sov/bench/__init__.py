"""Benchmarks of others: the harness's tasks, suites, differences, contamination."""
