"""Suggestions for unknown options and settings: the only name that contains every part of the typed word."""

import pytest

from megatron_sov.base.hints.table import find_by_parts
from megatron_sov.model.recipes.requested import RecipeOptions

NAMES = RecipeOptions.list_settings()


@pytest.mark.parametrize(("word", "setting"), [
    ("--clip-gradient-norm", "optim.clip_grad"), ("expert_dispatcher_kind", ""),
    ("initStandardDeviation", ""), ("--rotary-base", "model.rope_theta"),
    ("--sliding-window-tokens", "model.sliding_window_tokens"), ("--awq", ""), ("--stride", ""),
    ("--the", ""), ("--", "")])
def test_finds_the_setting_with_all_parts_of_the_word(word: str, setting: str) -> None:
    assert find_by_parts(word, NAMES) == setting


def test_settings_of_list_items_have_their_place() -> None:
    assert "data.phases.0.seq_len" in NAMES
