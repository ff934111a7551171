"""Parquet tables with a declared schema, written and read concurrently by jobs on many machines."""
