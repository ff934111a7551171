"""Pictures and sounds as the rest meets them: read safely, placed in a text, and numbered in a vocabulary."""
