"""Bytes of one GPU: parameters, states, activations."""
