"""A model behind an OpenAI-compatible address: requests, what is written to them, and the server."""
