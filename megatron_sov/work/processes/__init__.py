"""Start, limit, query and stop processes: children, worker pools, commands."""
