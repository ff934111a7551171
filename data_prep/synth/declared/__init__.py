"""Generator files: reading, compiling and running."""
