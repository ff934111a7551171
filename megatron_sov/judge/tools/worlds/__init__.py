"""Environments that are built in."""
