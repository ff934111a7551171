"""Prompts with pictures and sounds, and replies that hold them."""
