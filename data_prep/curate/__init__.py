"""Curate raw documents: parse, filter, deduplicate, score, decontaminate."""
