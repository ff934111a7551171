"""Resumable work: jobs, journals, parts, locks, claims and progress bars."""
