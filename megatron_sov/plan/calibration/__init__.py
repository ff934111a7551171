"""Plans held against runs: what was measured, learned, expected, and what fits."""
