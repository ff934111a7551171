"""Checks for the samples of all generators, made of the steps of the data pipeline."""
