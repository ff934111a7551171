"""The C++ extension of recomputed norms is compiled once, atomically and without a lock."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from megatron_sov.base.errors import UserError
from megatron_sov.engine.parallel import storage_extension
from megatron_sov.engine.parallel.storage_extension import extension_file, load_storage_extension


@pytest.fixture
def megatron_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return Megatron-Core's module, with no extension loaded, an empty cache, and no real compiler."""
    from megatron.core.tensor_parallel import random

    def load_text(file: Path) -> str:
        if not file.exists() or not file.read_text().startswith("compiled"):
            raise ImportError(file)
        return file.read_text()

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(random, "_share_storage_ext", None)
    monkeypatch.setattr(storage_extension, "_load", load_text)
    monkeypatch.setattr(storage_extension, "find_missing_tools", list)
    return random


def compile_text(name: str, source: str, *, functions: list[str], build_directory: str) -> None:
    """Stand for torch's compilation, which waits for a lock file in its folder."""
    assert not Path(build_directory, "lock").exists()
    Path(build_directory, f"{name}.so").write_text("compiled " + functions[0])


def test_second_run_reads_the_file_of_the_first(
    megatron_random: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setattr(cpp_extension, "load_inline", compile_text)
    load_storage_extension(["moe", "core_attn"])
    assert megatron_random._share_storage_ext is None and not (tmp_path / "cache").exists()
    load_storage_extension(["layernorm"])
    assert megatron_random._get_share_storage.__globals__["_share_storage_ext"] == "compiled share_storage"
    monkeypatch.setattr(cpp_extension, "load_inline", None)
    monkeypatch.setattr(megatron_random, "_share_storage_ext", None)
    load_storage_extension(["moe_act"])
    assert megatron_random._share_storage_ext == "compiled share_storage"


def test_killed_compilation_stops_no_later_run(megatron_random: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(name: str, source: str, *, functions: list[str], build_directory: str) -> None:
        Path(build_directory, "lock").touch()
        Path(build_directory, f"{name}.so").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp_extension, "load_inline", kill)
    file = extension_file(megatron_random._SHARE_STORAGE_SRC)
    with pytest.raises(KeyboardInterrupt):
        load_storage_extension(["layernorm"])
    assert not list(file.parent.iterdir())
    (file.parent / "lock").touch()  # SIGKILL leaves the files written so far
    file.write_text("of another torch")
    monkeypatch.setattr(cpp_extension, "load_inline", compile_text)
    load_storage_extension(["layernorm"])
    assert megatron_random._share_storage_ext == "compiled share_storage"


def test_second_process_of_a_node_compiles_nothing(megatron_random: Any,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_extension, "run_on_each_rank", lambda action: action(1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cpp_extension, "load_inline", None)
    with pytest.raises(UserError, match="set TORCH_EXTENSIONS_DIR to a folder that all processes of a node"):
        load_storage_extension(["layernorm"])
    monkeypatch.setattr(cpp_extension, "load_inline", compile_text)
    monkeypatch.setenv("LOCAL_RANK", "0")
    load_storage_extension(["layernorm"])
    assert megatron_random._share_storage_ext == "compiled share_storage"


def test_missing_tools_and_failed_compilations_are_named(
    megatron_random: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("Error building extension\nmain.cpp:1: fatal error: Python.h: No such file\nninja")

    monkeypatch.setattr(cpp_extension, "load_inline", fail)
    with pytest.raises(UserError, match=r"modules = \['layernorm'\].*fatal error: Python.h.*python3-dev"):
        load_storage_extension(["layernorm"])
    monkeypatch.undo()
    monkeypatch.setattr(megatron_random, "_share_storage_ext", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(Path("absent").absolute()))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "clang++ -O1")
    with pytest.raises(UserError, match=r"has no clang\+\+ and no ninja in PATH; `apt-get .*\[\"moe\"\]"):
        load_storage_extension(["layernorm"])


@pytest.mark.deep
def test_compiled_extension_shares_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron.core.tensor_parallel import random

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(random, "_share_storage_ext", None)
    load_storage_extension(["layernorm"])
    target, source = torch.zeros(3), torch.arange(3.0)
    view = target.view(3, 1)
    random._get_share_storage()(target, source)
    assert view.flatten().tolist() == [0, 1, 2] and target.data_ptr() == source.data_ptr()
