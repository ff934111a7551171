"""Tokenizers of pictures, and networks that draw."""
