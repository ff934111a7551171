"""Prompts with pictures and sounds, and replies that contain them."""
