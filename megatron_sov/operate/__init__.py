"""Runs on a cluster: jobs, bundles for no network, what a machine has."""
