"""Readers that turn input files into items."""
