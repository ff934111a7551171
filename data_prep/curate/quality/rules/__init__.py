"""Rules of good text from Gopher, C4 and FineWeb, with the thresholds of each language as data."""
