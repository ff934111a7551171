"""Engines that answer requests: the decoder of checkpoints, transformers, vLLM."""
