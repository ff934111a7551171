"""Runs on a cluster: jobs, Kubernetes, bundles for no network, what a machine has."""
