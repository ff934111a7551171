"""Synthetic data: generators send prompts, check replies, and resume after a kill."""
