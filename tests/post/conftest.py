"""Pairs of answers, packed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pairs(packed_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose better answer is the right sum, packed."""
    from data_prep.cli import main as sov_data

    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({
        "prompt": f"What is {i} plus {i % 7}?", "chosen": f"{i} plus {i % 7} is {i + i % 7}.",
        "rejected": f"It is {i}." + " I am sure." * (i % 3)}) for i in range(60)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1",
                     "--format", "preference", "--input", str(folder / "pairs.jsonl"),
                     "--output", str(folder / "pairs")]) == 0
    return folder / "pairs"
