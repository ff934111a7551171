"""Codecs between media and tokens, and encoders from media to features."""
