"""Decode with `ForwardModel` at the layout of a checkpoint."""
