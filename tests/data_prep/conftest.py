"""A small tokenizer of each preset, trained once."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from tokenizer.cli import main


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer artifacts with 384 ids: "solar-open" and "k-exaone"."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(inspect.getsource(textwrap)
                                     + "한국어 문장입니다. 다른 한국어 문장입니다.\n" * 20)
    for preset in ("solar-open", "k-exaone"):
        assert main(["train", "--preset", preset, "--vocab-size", "384", "--input", str(folder / "text.txt"),
                     "--output", str(folder / preset)]) == 0
    return {preset: folder / preset for preset in ("solar-open", "k-exaone")}
