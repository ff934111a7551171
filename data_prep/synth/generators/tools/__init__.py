"""Generators of tool data: worlds that are data, goals in them, and conversations that reach the goals."""
