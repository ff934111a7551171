"""Reference quantisers in plain torch, on any device: each takes a tensor and gives back, in float32, the
numbers that its 8 or 4 bits stand for.

They say what the recipes of `train.fp8` compute.  Tests put them into the matrix products of Transformer
Engine's double; on a GPU they are what the real products are compared with.
"""
