"""Worlds that are data: tables, and tools whose behaviour is a list of steps over them."""
