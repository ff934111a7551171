"""The generators, a file for each kind of data."""
