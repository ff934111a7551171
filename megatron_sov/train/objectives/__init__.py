"""Objectives: their interface, micro-batches, next-token prediction, and held-out evaluation."""
