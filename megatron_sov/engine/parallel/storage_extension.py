"""The C++ extension with which megatron-core recomputes norms and expert activations.

Megatron-Core compiles it in the first backward pass: on all ranks at once, in one folder of the user's home,
under a lock file of torch that a killed rank leaves there, so that later runs wait without end.  Here the
first rank of each node compiles it before the first step, in a temporary folder; the finished file is then
renamed, which needs no lock."""

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch.utils import cpp_extension

from megatron_sov.base.artifacts import create_file
from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.engine.parallel.world import run_on_each_rank

NAME = "share_storage_ext"
RECOMPUTED_BY_EXTENSION = {"layernorm", "moe_act"}
"""`gpu.recompute_modules` values whose outputs Megatron-Core frees and recomputes in place."""
TOOLS_COMMAND = "apt-get install g++ ninja-build"
OTHER_MODULES = 'recompute other modules (gpu.recompute_modules=["moe"])'


def find_missing_tools() -> list[str]:
    """Return the programs that torch calls to compile an extension and that PATH lacks."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return [program for program in (compiler[0], "ninja") if shutil.which(program) is None]


def load_storage_extension(recompute_modules: Collection[str] | None) -> None:
    """Compile and load the extension if the recomputed modules need it; called by all processes together.
    Raises `UserError`: a node lacks the compiler or ninja, or the compilation fails (on every process); this
    process does not see the compiled file."""
    needed = RECOMPUTED_BY_EXTENSION.intersection(recompute_modules or ())
    if not needed or random._share_storage_ext is not None:
        return
    file = extension_file(random._SHARE_STORAGE_SRC)

    def compile_on_first(rank: int, size: int) -> None:
        if size == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
            _compile(file, random._SHARE_STORAGE_SRC, f"gpu.recompute_modules = {sorted(needed)}")

    run_on_each_rank(compile_on_first)
    try:
        random._share_storage_ext = _load(file)
    except (ImportError, OSError) as e:
        raise UserError(f"{file}: cannot be loaded ({first_error_line(e)}), and the first process of this "
                        "node compiled it; set TORCH_EXTENSIONS_DIR to a folder that all processes of a node "
                        "share") from e


def extension_file(source: str) -> Path:
    """Return the compiled extension's path in TORCH_EXTENSIONS_DIR (default: ~/.cache/torch_extensions); it
    depends on source, torch version, Python version and machine kind."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    build = f"torch{torch.__version__}-{sys.implementation.cache_tag}-{platform.machine()}"
    return root / f"megatron-sov-{build}" / digest / f"{NAME}.so"


def _load(file: Path) -> Any:
    """Import the compiled extension; ImportError or OSError if missing or built for another torch."""
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _compile(file: Path, source: str, setting: str) -> None:
    """Compile the extension (30 s) unless the file can be imported; errors: see `load_storage_extension`."""
    try:
        _load(file)
        return
    except (ImportError, OSError):  # missing, or not of this torch
        pass
    node = f"{setting}: megatron-core compiles a C++ extension for it, and {socket.gethostname()}"
    if missing := find_missing_tools():
        raise UserError(f"{node} has no {' and no '.join(missing)} in PATH; `{TOOLS_COMMAND}`, or "
                        f"{OTHER_MODULES}")
    try:
        with create_file(file, create_parents=True) as finished, tempfile.TemporaryDirectory() as folder:
            cpp_extension.load_inline(NAME, source, functions=["share_storage"], build_directory=folder)
            shutil.copyfile(Path(folder, f"{NAME}.so"), finished)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as e:
        reason = next((line for line in str(e).splitlines() if "error:" in line), first_error_line(e))
        raise UserError(f"{node} cannot compile it ({reason}); `{TOOLS_COMMAND} python3-dev`, or "
                        f"{OTHER_MODULES}") from e
