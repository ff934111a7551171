"""A double of Transformer Engine 2.20.2 in plain torch, for tests on a CPU.

It has the names, signatures, parameter names and process-group traffic of the real one where megatron-core
0.19.2 and this project reach it, and computes what the real one's documentation and kernels say, in the dtype
of its inputs, float64 included.  Only tests put it on the path.
"""

from . import common, pytorch  # noqa: F401

__version__ = "2.20.2"
