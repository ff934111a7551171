"""Reference quantizers in plain torch, on any device: each takes a tensor and returns, in float32, the values
that its 8-bit or 4-bit codes represent.

They define the results of the `train.fp8` recipes. Tests quantize the matrix products of the Transformer
Engine double with them; on a GPU, the products of Transformer Engine are compared with them.
"""
