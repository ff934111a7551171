"""Objectives: their interface, micro-batches, next-token prediction, and evaluation of held-out documents."""
