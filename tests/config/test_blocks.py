"""Blocks of ids of media in a model's vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.config import IdBlock


@pytest.mark.parametrize(("audio", "image", "words"), [
    ((0, 10), (10, 10), ""), ((0, 10), None, ""), ((10, 10), (0, 10), ""),
    ((0, 11), (10, 10), "audio_tokens reaches up to 11 and model.image_tokens begins at 10"),
    ((10, 10), (-1, 5), "image_tokens = -1 + 5 must lie within"), ((0, 0), None, "at least one id"),
    (None, (10**9, 1), "must lie within model.vocab_size")])
def test_blocks_lie_in_the_vocabulary_apart(audio: tuple[int, int] | None, image: tuple[int, int] | None,
                                            words: str) -> None:
    model = replace(recipes.get("tiny-qwen3").model, audio_tokens=audio and IdBlock(*audio),
                    image_tokens=image and IdBlock(*image))
    assert [words in problem for problem in model.problems()] == ([True] if words else [])


def test_a_weight_without_its_block_is_refused() -> None:
    config = recipes.get("tiny-qwen3")
    weighted = replace(config, objective=replace(config.objective, audio_weight=0.5))
    assert any("objective.audio_weight = 0.5 needs model.audio_tokens" in p for p in weighted.problems(1))
    model = replace(config.model, audio_tokens=IdBlock(0, 8))
    assert not weighted.__class__(**{**vars(weighted), "model": model}).objective.problems(model)
    wrong = replace(config.objective, image_weight=-1.0, name="preference")
    assert len(wrong.problems(replace(config.model, image_tokens=IdBlock(0, 8)))) == 2
