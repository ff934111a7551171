"""Tokenizers of sounds, and networks that speak."""
