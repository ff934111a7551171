"""Commands that train a model from data."""
