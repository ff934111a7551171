"""A double of Transformer Engine 2.20.2 in plain torch, for tests on CPUs.

It has the names, signatures, parameter names and process-group traffic of the parts that megatron-core 0.19.2
and this project use, and computes their documented results in the dtype of its inputs, float64 included. Only
tests import it.
"""

from . import common, pytorch  # noqa: F401

__version__ = "2.20.2"
