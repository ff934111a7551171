"""Functions for prompts and values in generator files, without requests to models."""
