"""Units for sizes and times."""

from __future__ import annotations

GIB = 1 << 30
"""Bytes; 2**30."""
HOURS_OF_A_DAY = 24
SECONDS_OF_AN_HOUR = 3600
SECONDS_OF_A_DAY = HOURS_OF_A_DAY * SECONDS_OF_AN_HOUR
SECONDS_OF_A_YEAR = 365.25 * HOURS_OF_A_DAY * SECONDS_OF_AN_HOUR
