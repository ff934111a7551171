"""Tables: rows of a declared schema in Parquet, written by jobs of many machines and read at once."""
