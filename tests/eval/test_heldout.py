"""Held-out documents: cut into rows, weighed in bytes, and refused where they cannot judge."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.cli import main
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()

from megatron_sov.errors import UserError  # noqa: E402
from megatron_sov.eval.heldout import HeldoutData, evaluate_rows, open_heldout  # noqa: E402


def test_a_known_loss_per_byte_comes_out(token_shards: Path) -> None:
    """With ln 2 nats for every byte of a target, each source must give exactly 1 bit per byte."""
    data = open_heldout({str(token_shards): 1.0}, 90, 2000)
    sizes = data.bytes_of_token(1024)
    assert sizes is not None
    results = evaluate_rows(data,
                            lambda row: np.where(row.weights > 0, sizes[row.labels] * math.log(2), math.nan))
    assert set(results) == {"first", "second"}
    for result in results.values():
        assert result.bits_per_byte == pytest.approx(1.0, rel=1e-12)
        assert 1000 < result.tokens < 2000


def test_no_learned_token_is_no_perfect_score(token_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = HeldoutData.rows
    monkeypatch.setattr(HeldoutData, "rows", lambda self, index: (
        dataclasses.replace(row, weights=0 * row.weights) for row in rows(self, index)))
    with pytest.raises(UserError, match="none of its held-out tokens is learned"):
        open_heldout({str(token_shards): 1.0}, 90, 2000)


def test_data_that_cannot_judge_is_refused(one_rank: None, imported: dict[str, Path], token_shards: Path,
                                           tmp_path: Path, capsys) -> None:
    other = shutil.copytree(token_shards, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["eval", "ppl", str(imported["solar_open"]), "--data", str(other)]) == 2
    assert "2 ids mean other tokens than in" in capsys.readouterr().err
    manifest = json.loads((other / "manifest.json").read_text())
    for source in manifest["content"]["sources"]:
        source["splits"]["heldout"]["num_tokens"] = 0
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": ""}))
    assert main(["eval", "bigram", "--data", str(other)]) == 2
    assert "holds no documents out" in capsys.readouterr().err
