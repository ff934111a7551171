"""Compiled code: it works where it cannot be kept, and only training pays for its library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.base.documents import compiled


def test_compiled_code_works_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = compiled.numba.njit

    def refusing(**options: bool) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiled, "numba", SimpleNamespace(njit=refusing))
    assert compiled.compiled(lambda x: x + 1)(4) == 5


def test_what_does_not_train_does_not_load_the_compiler() -> None:
    code = ("import sys, tokenizer.cli, tokenizer.train, tokenizer.formats.hf_files\n"
            "sys.exit('numba' in sys.modules)")
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=600).returncode == 0
