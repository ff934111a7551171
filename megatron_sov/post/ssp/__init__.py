"""The spectrum phase of VibeThinker (arXiv 2511.06221): which checkpoint is best in which domain."""
