"""Log-probabilities of the reference model: for training and held-out documents, and after a resume."""

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
    [scored_source] = Reference(tmp_path, pairs, [source], 128).sources
    original, scored = source.open_split("heldout"), scored_source.open_split("heldout")
    assert list(scored.lengths) == list(original.lengths)
    for document, length in enumerate(original.lengths):
        assert (scored.tokens(document, 0, length) == original.tokens(document, 0, length)).all()
    assert list(scored_source.open_split("train").lengths) == list(source.open_split("train").lengths)
    check_columns([scored_source], {COLUMN: NeededColumn("")})


def test_heldout_logprobs_are_stored_like_samples(pairs: Path, tmp_path: Path) -> None:
    [source] = open_pairs(pairs)
    reference = Reference(tmp_path, pairs, [source], 128, {"pairs": range(4)})
    reference._open_files()
    assert reference._find_missing() == [("pairs", 0), ("pairs.heldout", 0)]
    for files in reference._files.values():
        count = files.compute_offsets(0)[-1]
        write_sealed(files.get_file(0), np.arange(count, dtype=np.float32).tobytes(), files.identify(0))
    lengths = source.open_split("heldout").lengths[np.arange(4)]
    reopened = Reference(tmp_path, pairs, [source], 128, {"pairs": range(4)})
    reopened.check_unchanged()
    assert reopened.heldout_logprobs(source).tolist() == list(range(sum(lengths)))
    flip_bit(reopened._files["pairs.heldout"].get_file(0))
    for failing_call in (reopened.check_unchanged, lambda: Reference(
            tmp_path, pairs, [source], 128, {"pairs": range(4)}).heldout_logprobs(source)):
        with pytest.raises(UserError, match=r"pairs\.heldout\.000000\.f32: is damaged"):
            failing_call()


def write_checkpoint_double(folder: Path, weights: str) -> Path:
    """Write a folder with the manifest of a checkpoint, and text for its weights."""
    with create_artifact(folder, "checkpoint") as artifact:
        (artifact.path / "model.safetensors").write_text(weights)
    return folder


def test_reference_is_identified_by_weights_data_and_samples(pairs: Path, tmp_path: Path) -> None:
    def open_reference(checkpoint: Path, max_tokens: int = 128) -> Reference:
        return Reference(tmp_path / "run", checkpoint, open_pairs(pairs), max_tokens)

    first, same_weights, other_weights = (
        write_checkpoint_double(tmp_path / name, weights)
        for name, weights in (("a", "one"), ("b", "one"), ("c", "two")))
    open_reference(first)._open_files()
    open_reference(same_weights)._open_files()  # such as a Hugging Face folder that was converted once more
    for changed_reference in (open_reference(other_weights), open_reference(first, 256)):
        with pytest.raises(UserError, match="another reference, other data"):
            changed_reference._open_files()


def test_resume_rejects_missing_reference_logprobs(pairs: Path, tmp_path: Path, capsys: Any) -> None:
    def open_reference(max_tokens: int) -> Reference:
        return Reference(tmp_path / "run", pairs, open_pairs(pairs), max_tokens)

    with pytest.raises(UserError, match=r"reference.json: holds no log-probabilities"):
        open_reference(128).check_unchanged()
    open_reference(128)._open_files()
    files = open_reference(128)._files["pairs"]
    write_sealed(files.get_file(0), np.zeros(files.compute_offsets(0)[-1], np.float32).tobytes(),
                 files.identify(0))
    open_reference(64).check_unchanged()
    assert files.read_logprobs(0, 0, 2).tolist() == [0, 0] and open_reference(128)._find_missing() == []
    with pytest.raises(UserError, match=r"samples have 256 \(data"):
        open_reference(256).check_unchanged()
    flip_bit(files.get_file(0))
    for failing_call in (open_reference(128).check_unchanged,
                         lambda: open_reference(128)._files["pairs"].read_logprobs(0, 0, 2)):
        with pytest.raises(UserError, match=r"000000.f32: is damaged"):
            failing_call()
    assert open_reference(128)._find_missing() == [("pairs", 0)]
    assert "000000.f32: is damaged or belongs elsewhere (it differs from its own checksum); it is" in (
        capsys.readouterr().err)


def test_reference_rejects_long_samples(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = SimpleNamespace(path="other", max_tokens=16)
    monkeypatch.setattr(reference, "Target", lambda *_: target)
    monkeypatch.setattr(reference, "run_forward_model", lambda *_: None)
    config = recipes.get("tiny-solar-open")
    longest = int(max(open_pairs(pairs)[0].open_split("train").lengths))
    with pytest.raises(UserError, match=rf"reads at most 16 tokens.* has samples of {longest};"):
        reference.Reference(tmp_path / "run", pairs, open_pairs(pairs), 4096).score_in_processes(
            pairs, config, None)
    reference.Reference(tmp_path / "run", pairs, open_pairs(pairs), 16).score_in_processes(
        pairs, config, None)
