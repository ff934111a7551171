"""Conversations as a tokenizer's own template frames them: text, ids, and which of them are learned."""
