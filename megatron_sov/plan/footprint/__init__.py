"""Bytes per GPU: parameters, states, activations."""
