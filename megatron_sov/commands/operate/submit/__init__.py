"""Submission of stages and chains to Slurm."""
