"""Comparison of a layout's training step with the step of one process. One process computes all ranks.

The import switches the process to megatron-core on CPUs, even if the machine has a GPU.
"""

from megatron_sov.engine.parallel.cpu_shims import prepare_without_gpu

prepare_without_gpu()
