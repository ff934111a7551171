"""Text, tables and JSON for a plan."""
