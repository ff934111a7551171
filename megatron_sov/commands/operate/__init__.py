"""Commands that run, watch and price runs."""
