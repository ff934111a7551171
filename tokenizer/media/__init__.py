"""Tokens of pictures and sounds behind those of text."""
