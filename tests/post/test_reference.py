"""What a reference says of documents: of those to train on, and known again by what it was made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.artifacts import new_artifact
from megatron_sov.data.columns import NeededColumn, refuse_without_columns
from megatron_sov.data.token_shards import Source, open_sources
from megatron_sov.errors import UserError


def opened(pairs: Path) -> list[Source]:
    return open_sources({str(pairs): 1.0}, 10**6, ("preference",))


def test_pairs_that_are_held_out_stay_what_they_are(pairs: Path, tmp_path: Path) -> None:
    from megatron_sov.post.reference import COLUMN, Reference

    [source] = opened(pairs)
    [learned] = Reference(tmp_path, pairs, [source], 128).sources
    held, found = source.shard("heldout"), learned.shard("heldout")
    assert list(found.lengths) == list(held.lengths)
    assert [found.tokens(d, 0, n).tolist() for d, n in enumerate(found.lengths)] == [
        held.tokens(d, 0, n).tolist() for d, n in enumerate(held.lengths)]
    assert list(learned.shard("train").lengths) == list(source.shard("train").lengths)
    refuse_without_columns([learned], {COLUMN: NeededColumn("")})


def start(folder: Path, weights: str) -> Path:
    """Return what stands for a checkpoint that was made just now."""
    with new_artifact(folder, "checkpoint") as artifact:
        (artifact.path / "model.safetensors").write_text(weights)
    return folder


def test_a_reference_is_known_again_by_its_weights_its_data_and_its_samples(pairs: Path,
                                                                            tmp_path: Path) -> None:
    from megatron_sov.post.reference import Reference

    def reference(checkpoint: Path, max_tokens: int = 128) -> Reference:
        return Reference(tmp_path / "run", checkpoint, opened(pairs), max_tokens)

    first, again, other = (start(tmp_path / n, w) for n, w in (("a", "one"), ("b", "one"), ("c", "two")))
    reference(first)._open()
    reference(again)._open()  # such as a Hugging Face folder that was converted once more
    for changed in (reference(other), reference(first, 256)):
        with pytest.raises(UserError, match=r"another reference, of other data or for other lengths .*del"):
            changed._open()


def test_a_run_goes_on_only_with_what_its_reference_has_read(pairs: Path, tmp_path: Path) -> None:
    from megatron_sov.post.reference import Reference

    def reference(max_tokens: int) -> Reference:
        return Reference(tmp_path / "run", pairs, opened(pairs), max_tokens)

    with pytest.raises(UserError, match=r"reference.json: holds no log-probabilities of source 'pairs' as"):
        reference(128).refuse_changed()
    reference(128)._open()
    reference(64).refuse_changed()
    with pytest.raises(UserError, match=r"reach to token 128 of a document, and samples have 256 \(data"):
        reference(256).refuse_changed()
