"""Units for sizes and times."""

GIB = 1 << 30
"""Bytes; 2**30."""
HOURS_PER_DAY = 24
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = HOURS_PER_DAY * SECONDS_PER_HOUR
