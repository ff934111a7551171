"""Functions that prompts and values of generator files call; none sends a request."""
