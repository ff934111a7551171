"""Compare a layout's training steps with a single process; all ranks are simulated in this process.

The import switches the process to megatron-core on CPUs, even if the machine has a GPU.
"""

from layout_proof.cpu_shims import prepare_without_gpu

prepare_without_gpu()
