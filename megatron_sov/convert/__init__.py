"""Conversion between checkpoints and Hugging Face folders: `to_hf`, `from_hf`, `verify`, `open_weights`.

The functions are loaded on first use, so that `megatron-sov convert --help` does not wait for torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sov.convert.averaging import average
    from megatron_sov.convert.hf_export import ParityCheck, to_hf, verify
    from megatron_sov.convert.hf_import import from_hf
    from megatron_sov.convert.live_import import export_weights, import_weights
    from megatron_sov.convert.peft import open_weights
    from megatron_sov.convert.sources import is_hf_folder

DEFAULT_WORKERS = max(1, min(4, os.cpu_count() or 1))
"""Default number of files converted at a time: one per core, at most 4; each needs memory for two tensors."""
MAX_SHARD_BYTES = 5_000_000_000
"""Default maximum size for written safetensors files."""
_MODULES = {"ParityCheck": "hf_export", "average": "averaging", "export_weights": "live_import",
            "from_hf": "hf_import", "import_weights": "live_import", "is_hf_folder": "sources",
            "open_weights": "peft", "to_hf": "hf_export", "verify": "hf_export"}
__all__ = ["DEFAULT_WORKERS", "MAX_SHARD_BYTES", "ParityCheck", "average", "export_weights", "from_hf",
           "import_weights", "is_hf_folder", "open_weights", "to_hf", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
