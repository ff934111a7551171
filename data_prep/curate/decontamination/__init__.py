"""Search for benchmark text in training data."""
