"""The only package that imports megatron-core."""

import importlib.util
import os
import sys
import types
from typing import Any

os.environ.setdefault("NO_VCS_VERSION", "1")  # otherwise the library reads a commit from this repository

# The library imports the kernels of its paged expert stash unconditionally. They need triton, which only
# torch's CUDA builds include, and no setting here uses them.
if importlib.util.find_spec("triton") is None:
    _absent: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    _absent.GLOBAL_BLOCK_SIZE = _absent.paged_stash_copy_kernel = _absent.paged_stash_pop_kernel = None
    sys.modules[_absent.__name__] = _absent
