"""An OpenAI-compatible server for one model: request bodies, scheduling and replies."""
