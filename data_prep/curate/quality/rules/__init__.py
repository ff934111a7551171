"""Quality rules from Gopher, C4 and FineWeb, with thresholds per language."""
