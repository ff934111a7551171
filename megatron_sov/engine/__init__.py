"""The only door to megatron-core."""

import importlib.util
import os
import sys
import types
from typing import Any

os.environ.setdefault("NO_VCS_VERSION", "1")  # the library asks git for its commit, and would get ours

# The library imports the kernels of its paged stash of experts' inputs whatever is set. They need triton,
# which comes with torch's CUDA builds alone, and no setting here reaches them.
if importlib.util.find_spec("triton") is None:
    _absent: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    _absent.GLOBAL_BLOCK_SIZE = _absent.paged_stash_copy_kernel = _absent.paged_stash_pop_kernel = None
    sys.modules[_absent.__name__] = _absent
