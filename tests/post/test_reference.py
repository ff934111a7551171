"""Reference log-probabilities: of training and held-out documents, and after a resume."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import write_sealed
from megatron_sov.post import reference
from megatron_sov.post.reference import COLUMN, Reference
from megatron_sov.train.data.requirements import NeededColumn, check_columns
from megatron_sov.train.data.sources import Source, open_sources
from tests.breakers import flip_bit


def open_pairs(pairs: Path) -> list[Source]:
    return open_sources({str(pairs): 1.0}, 10**6, ("preference",))


def test_held_out_pairs_do_not_change(pairs: Path, tmp_path: Path) -> None:
    [source] = open_pairs(pairs)
    [learned] = Reference(tmp_path, pairs, [source], 128).sources
    held, found = source.open_split("heldout"), learned.open_split("heldout")
    assert list(found.lengths) == list(held.lengths)
    assert [found.tokens(d, 0, n).tolist() for d, n in enumerate(found.lengths)] == [
        held.tokens(d, 0, n).tolist() for d, n in enumerate(held.lengths)]
    assert list(learned.open_split("train").lengths) == list(source.open_split("train").lengths)
    check_columns([learned], {COLUMN: NeededColumn("")})


def test_heldout_logprobs_are_stored_like_samples(pairs: Path, tmp_path: Path) -> None:
    [source] = open_pairs(pairs)
    reference = Reference(tmp_path, pairs, [source], 128, {"pairs": range(4)})
    reference._open_files()
    assert reference._find_missing() == [("pairs", 0), ("pairs.heldout", 0)]
    for parts in reference._parts.values():
        count = parts.starts(0)[-1]
        write_sealed(parts.file(0), np.arange(count, dtype=np.float32).tobytes(), parts.identify(0))
    lengths = source.open_split("heldout").lengths[np.arange(4)]
    again = Reference(tmp_path, pairs, [source], 128, {"pairs": range(4)})
    again.check_unchanged()
    assert again.heldout_logprobs(source).tolist() == list(range(sum(lengths)))
    flip_bit(again._parts["pairs.heldout"].file(0))
    for read in (again.check_unchanged, lambda: Reference(
            tmp_path, pairs, [source], 128, {"pairs": range(4)}).heldout_logprobs(source)):
        with pytest.raises(UserError, match=r"pairs\.heldout\.000000\.f32: is damaged"):
            read()


def start(folder: Path, weights: str) -> Path:
    """Return a stand-in for a newly written checkpoint."""
    with create_artifact(folder, "checkpoint") as artifact:
        (artifact.path / "model.safetensors").write_text(weights)
    return folder


def test_reference_is_identified_by_weights_data_and_samples(pairs: Path, tmp_path: Path) -> None:
    def reference(checkpoint: Path, max_tokens: int = 128) -> Reference:
        return Reference(tmp_path / "run", checkpoint, open_pairs(pairs), max_tokens)

    first, again, other = (start(tmp_path / n, w) for n, w in (("a", "one"), ("b", "one"), ("c", "two")))
    reference(first)._open_files()
    reference(again)._open_files()  # such as a Hugging Face folder that was converted once more
    for changed in (reference(other), reference(first, 256)):
        with pytest.raises(UserError, match="another reference, other data"):
            changed._open_files()


def test_resume_rejects_missing_reference_logprobs(pairs: Path, tmp_path: Path, capsys: Any ) -> None:
    def reference(max_tokens: int) -> Reference:
        return Reference(tmp_path / "run", pairs, open_pairs(pairs), max_tokens)

    with pytest.raises(UserError, match=r"reference.json: holds no log-probabilities"):
        reference(128).check_unchanged()
    reference(128)._open_files()
    parts = reference(128)._parts["pairs"]
    write_sealed(parts.file(0), np.zeros(parts.starts(0)[-1], np.float32).tobytes(), parts.identify(0))
    reference(64).check_unchanged()
    assert parts.column(0, 0, 2).tolist() == [0, 0] and reference(128)._find_missing() == []
    with pytest.raises(UserError, match=r"samples have 256 \(data"):
        reference(256).check_unchanged()
    flip_bit(parts.file(0))
    for read in (reference(128).check_unchanged, lambda: reference(128)._parts["pairs"].column(0, 0, 2)):
        with pytest.raises(UserError, match=r"000000.f32: is damaged"):
            read()
    assert reference(128)._find_missing() == [("pairs", 0)]
    assert "000000.f32: is damaged or belongs elsewhere (it differs from its own checksum); it is" in (
        capsys.readouterr().err)


def test_reference_rejects_long_samples(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(path="other", max_tokens=16)
    monkeypatch.setattr(reference, "Target", lambda *_: other)
    monkeypatch.setattr(reference, "run_forward_model", lambda *_: None)
    config = recipes.get("tiny-solar-open")
    longest = int(max(open_pairs(pairs)[0].open_split("train").lengths))
    with pytest.raises(UserError, match=rf"reads at most 16 tokens.* has samples of {longest};"):
        reference.Reference(tmp_path / "run", pairs, open_pairs(pairs), 4096).score_in_processes(pairs,
                                                                                                 config, None)
    reference.Reference(tmp_path / "run", pairs, open_pairs(pairs), 16).score_in_processes(pairs, config,
                                                                                           None)
