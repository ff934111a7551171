"""Conversion of training arguments to a checked stage."""
