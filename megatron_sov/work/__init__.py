"""Processes, locks, journals, endpoints, tables and cluster jobs. Only this package starts processes."""
