"""Learning from a teacher: its states, the loss, what the student writes."""
