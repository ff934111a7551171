"""Slurm jobs, and the library signatures for `doctor`."""
