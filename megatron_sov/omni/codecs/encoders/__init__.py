"""Encoders of pictures and sounds whose features a language model reads: transformers' classes, what brings
their features to the model's width, and the compressor of long recordings."""
