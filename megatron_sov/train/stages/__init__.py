"""Training stages: checks, launch, restart, completion, and the texts that a run prints."""
