"""Reference quantizers in plain torch, on any device: each takes a tensor and returns, in float32, the values
that its 8-bit or 4-bit codes represent.

They say what the recipes of `train.fp8` compute.  Tests put them into the matrix products of Transformer
Engine's double; on a GPU they are what the real products are compared with.
"""
