"""Whether a layout's step equals one process': played by all ranks in one process."""
