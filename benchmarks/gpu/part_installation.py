"""What is installed: Transformer Engine imports and has the signatures that are counted on; `doctor` is
content."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from setting import DOUBLE, ROOT, Cost, Failed, Figures, Setting

sys.path.append(str(ROOT))
from tests.te_double.contract import Sources, described, is_same

LIBRARY = "transformer_engine"
NOT_THERE = "is not there"


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


def imported(name: str) -> Any:
    """Return what a dotted name stands for; None: there is nothing."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def differences(contract: dict[str, Any], folder: Path) -> list[str]:
    """Return where a library has another shape than the contract says, by the sources below a folder, as the
    contract was read; what of it does not import is another question (`absent`)."""
    sources, found = Sources(folder), []
    for name, shape in contract.items():
        here = described(sources, name)
        if shape is None or here is None:
            if here is not shape:
                found.append(f"{name}: {'is there, and not in the contract' if shape is None else NOT_THERE}")
        elif isinstance(shape, dict) and isinstance(here, dict):
            found += [f"{name}.{method}: {NOT_THERE}" for method in shape if method not in here]
            found += [f"{name}.{method}: has {here[method]}, the contract {text}"
                      for method, text in shape.items()
                      if method in here and not is_same(here[method], text)]
        elif shape != "extension" and not (isinstance(shape, str) and isinstance(here, str)
                                           and is_same(here, shape)):
            found.append(f"{name}: is {here}, the contract says {shape}")
    return found


def absent(contract: dict[str, Any]) -> list[str]:
    """Return the names of the contract that do not import here."""
    return [name for name, shape in contract.items() if shape is not None and imported(name) is None]


def cost(setting: Setting) -> Cost:
    """Return what the part does: `doctor` starts a process of its own, too."""
    return Cost(starts=2, steps=1)


def measure(setting: Setting) -> Figures:
    """Yield versions, where signatures differ, and what `doctor` says.

    Raises:
        Failed: a signature differs, or `doctor` finds that training cannot work.
    """
    yield "versions", versions(setting)
    contract = json.loads((DOUBLE / "contract.json").read_text(encoding="utf-8"))[LIBRARY]["symbols"]
    yield "symbols", len(contract)
    spec = importlib.util.find_spec(LIBRARY)
    assert spec is not None and spec.submodule_search_locations
    found = differences(contract, Path(spec.submodule_search_locations[0]).parent)
    yield "differences", found
    yield "do not import", (lacking := absent(contract))
    if setting.dry:  # the double has no more than it needs
        found, lacking = [d for d in found if not d.endswith(NOT_THERE)], []
    if wrong := [*found, *(f"{name}: does not import" for name in lacking)]:
        raise Failed(f"{len(wrong)} names are not the contract's, the first: {wrong[0]}")
    yield "doctor", setting.command("megatron-sov", "doctor", on_gpu=not setting.dry).splitlines()
