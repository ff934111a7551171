"""Decode untrusted media in a restricted process."""
