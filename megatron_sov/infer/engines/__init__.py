"""Engines that answer requests: `MegatronEngine`, transformers, vLLM."""
