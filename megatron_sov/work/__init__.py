"""Work: the only place that starts processes, holds locks and keeps progress (with the launcher of ranks)."""
