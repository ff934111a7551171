"""Reading `torch_dist` checkpoints of Megatron-LM and Megatron-Bridge, whose index and headers are pickled.

Nothing is unpickled: `inert` walks through the opcodes and builds plain values and names, and calls nothing.
"""
