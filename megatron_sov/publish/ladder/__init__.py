"""Scaling ladders: a family of small models, the law that their losses follow, and what it says of the next
size."""
