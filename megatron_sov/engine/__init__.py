"""The only package that imports megatron-core. Importing it prepares the process for Megatron-Core."""

import importlib.util
import os
import sys
import types
from typing import Any

os.environ.setdefault("NO_VCS_VERSION", "1")  # otherwise Megatron-Core reads a commit from this repository

# Megatron-Core always imports the kernels of the paged expert stash. The kernels need triton, which only
# torch's CUDA builds include; no setting of this project uses them.
if importlib.util.find_spec("triton") is None:
    _absent: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    _absent.GLOBAL_BLOCK_SIZE = _absent.paged_stash_copy_kernel = _absent.paged_stash_pop_kernel = None
    sys.modules[_absent.__name__] = _absent

# After the stand-in above, before any module of this package imports megatron.
from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

prepare_megatron()
