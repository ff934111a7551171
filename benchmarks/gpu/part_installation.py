"""What is installed: Transformer Engine imports, has the signatures that are counted on, and `doctor` is content."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from setting import Failed, Setting


def versions(setting: Setting) -> dict[str, str]:
    """Return what runs here, and on what."""
    import megatron.core
    import transformer_engine

    found = {"torch": torch.__version__, "megatron-core": megatron.core.__version__,
             "transformer-engine": str(getattr(transformer_engine, "__version__", "double"))}
    if not setting.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "compute capability": f"{properties.major}.{properties.minor}",
                  "memory GiB": f"{properties.total_memory / 2**30:.1f}",
                  "cudnn": str(torch.backends.cudnn.version()), "cuda": str(torch.version.cuda)}
    return found
