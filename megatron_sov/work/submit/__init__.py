"""Distribute work over a cluster: Slurm arrays or Ray."""
