"""What is installed: Transformer Engine imports and has the signatures that are counted on; `doctor` is
content."""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

import torch
from setting import DOUBLE, Failed, Setting


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


def parameters(function: Any) -> list[str] | None:
    """Return the names of a function's parameters; None where it tells none (compiled code)."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def names_of(signature: str) -> list[str]:
    """Return the parameters' names in a signature of the contract, such as "(self, inp, *, x=None)"."""
    depth, names, current = 0, [], ""
    for character in signature.strip()[1:-1] + ",":
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            names.append(current.partition("=")[0].strip().lstrip("*"))
            current = ""
        else:
            current += character
    return [name for name in names if name and name != "/"]


def differences(contract: dict[str, Any]) -> list[str]:
    """Return where the imported library has another shape than the contract says."""
    found = []
    for name, shape in contract.items():
        here = imported(name)
        if shape is None or shape == "extension":
            continue
        if here is None:
            found.append(f"{name}: is not there")
        elif isinstance(shape, str):
            if (has := parameters(here)) is not None and has != names_of(shape):
                found.append(f"{name}: has {has}, the contract {names_of(shape)}")
        else:
            for method, signature in shape.items():
                has = parameters(inspect.getattr_static(here, method, None)) if isinstance(
                    signature, str) else None
                if has is not None and has != names_of(signature):
                    found.append(f"{name}.{method}: has {has}, the contract {names_of(signature)}")
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Return versions, and how many signatures agree.

    Raises:
        Failed: a signature differs, or `doctor` finds that training cannot work.
    """
    contract = json.loads((DOUBLE / "contract.json").read_text(encoding="utf-8"))
    symbols = contract["transformer_engine"]["symbols"]
    figures: dict[str, Any] = {"versions": versions(setting), "symbols": len(symbols)}
    if not setting.dry:  # the double has no more than it needs, which the tests hold to the contract
        figures["differences"] = differences(symbols)
        if figures["differences"]:
            raise Failed(f"{len(figures['differences'])} signatures are not the contract's, the first: "
                         f"{figures['differences'][0]}", **figures)
    figures["doctor"] = setting.command("megatron-sov", "doctor", on_gpu=not setting.dry).splitlines()
    return figures
