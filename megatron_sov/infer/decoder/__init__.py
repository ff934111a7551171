"""Decoding by a model that was trained here, at its own layout."""
