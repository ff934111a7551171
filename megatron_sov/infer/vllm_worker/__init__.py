"""What vLLM's own processes import: this folder, not the package, is on their path."""
