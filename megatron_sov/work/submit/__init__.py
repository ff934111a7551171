"""Shares of one work on the nodes of a cluster: arrays of Slurm, Indexed Jobs, Ray."""
