"""Processes, locks, journals, endpoints, tables and cluster jobs. Other packages start no processes
themselves."""
