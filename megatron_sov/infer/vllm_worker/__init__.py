"""Modules that vLLM's worker processes import by file name, with this folder on `sys.path`."""
