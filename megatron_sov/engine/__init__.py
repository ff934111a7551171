"""The only hall that imports megatron-core. Importing it prepares the process for Megatron-Core."""

from layout_proof.cpu_shims import prepare_without_gpu, stub_paged_stash
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.gpu_libraries import hide_broken_deep_ep

# Before any module of this package imports megatron.
if on_gpu():
    stub_paged_stash()
    hide_broken_deep_ep()
else:
    prepare_without_gpu()
