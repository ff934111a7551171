"""The installation: Transformer Engine imports and has the expected signatures, and `doctor` reports no
problem."""

import json
import pkgutil
import sys
from typing import Any

import torch
from setting import ROOT, Failed, Figures, Setting

sys.path.append(str(ROOT))
from tests.te_double import library_shapes as contract

LIBRARY = "transformer_engine"
OLD = ("transformer_engine.pytorch.cpp_extensions.cast_to_fp8",)
"""Compiled names of Transformer Engine before 2.0. megatron-core imports them only with such versions, and
the Python sources of the contract cannot show that newer ones lack them."""
OF_A_DOUBLE = (" is gone", " says extension")
"""Ends of differences that are allowed for the double: unused names, and Python functions in place of C++."""


def read_versions(setting: Setting) -> dict[str, str]:
    """Return the versions of the installed packages, driver and chip."""
    import megatron.core
    import transformer_engine

    versions = {"torch": torch.__version__, "megatron-core": megatron.core.__version__,
                "transformer-engine": str(getattr(transformer_engine, "__version__", "double"))}
    if not setting.dry:
        properties = torch.cuda.get_device_properties(0)
        versions |= {"gpu": properties.name, "compute capability": f"{properties.major}.{properties.minor}",
                     "memory GiB": f"{properties.total_memory / 2**30:.1f}",
                     "cudnn": str(torch.backends.cudnn.version()), "cuda": str(torch.version.cuda)}
    return versions


def can_import(name: str) -> bool:
    """Return whether a dotted name exists in the installed packages."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def find_absent(symbols: dict[str, Any]) -> list[str]:
    """Return the names of the contract that cannot be imported, except those of `OLD`."""
    return [name for name, shape in symbols.items()
            if shape is not None and name not in OLD and not can_import(name)]


def measure(setting: Setting) -> Figures:
    """Yield versions, differences of signatures, and the output of `doctor`.

    Raises:
        Failed: a signature differs, or `doctor` reports an error.
    """
    # on a CPU it replaces triton kernels that megatron-core imports
    import megatron_sov.engine  # noqa: F401

    yield "versions", read_versions(setting)
    symbols = json.loads(contract.CONTRACT.read_text(encoding="utf-8"))[LIBRARY]["symbols"]
    yield "symbols", len(symbols)
    sources = contract.find_installed(LIBRARY)
    assert sources is not None
    differences, absent = list(contract.differences(symbols, sources)), find_absent(symbols)
    yield "differences", differences
    yield "do not import", absent
    problems = [*differences, *(f"{name}: does not import" for name in absent)]
    if setting.dry:  # the double lacks names that this project does not use
        problems = [difference for difference in differences if not difference.endswith(OF_A_DOUBLE)]
    if problems:
        raise Failed(f"{len(problems)} names are not the contract's, the first: {problems[0]}")
    yield "doctor", setting.run_command("megatron-sov", "doctor", on_gpu=not setting.dry).splitlines()
