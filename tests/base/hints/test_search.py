"""Unknown options and settings: the ones of ours nearest in meaning are named."""

import pytest

from megatron_sov.base.hints.search import describe_candidates, find_by_meaning, shorten_help
from megatron_sov.model.recipes.requested import RecipeOptions
from tests.base.hints.test_words import answer

TEXTS = RecipeOptions.setting_texts()


@pytest.mark.parametrize(("word", "setting"), [
    ("--clip-gradient-norm", "optim.clip_grad"), ("--grouped-query-heads", "model.num_kv_heads"),
    ("expert_dispatcher_kind", "parallel.expert_dispatcher"), ("initStandardDeviation", "model.init_std"),
    ("--rotary-base", "model.rope_theta"), ("--recompute-activations-mode", "train.recompute"),
    ("--balance-loss-sequence", "model.seq_aux_loss_coeff")])
def test_finds_the_setting_by_name_help_and_foreign_words(word: str, setting: str) -> None:
    assert setting in find_by_meaning(word, TEXTS)


@pytest.mark.parametrize("word", ["--awq", "--stride", "--fsdp", "--the", "--"])
def test_finds_nothing_for_words_that_no_text_has(word: str) -> None:
    assert find_by_meaning(word, TEXTS) == []


def test_settings_of_list_items_have_their_place() -> None:
    assert TEXTS["data.phases.0.seq_len"].startswith("Tokens per sample")


def test_answer_names_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    said = answer("megatron-sov sft --from M --data D --run R --clip-gradient-norm 1", capsys)
    assert "--set optim.clip_grad=VALUE (Maximum global gradient norm)" in said
    said = answer("megatron-sov sft --from M --data D --run R --set train.clip_gradient_norm=1", capsys)
    assert "no such setting" in said and "optim.clip_grad" in said


def test_long_help_is_cut_at_a_word() -> None:
    assert shorten_help("One. Two.") == "One"
    assert shorten_help(f"begin {'word ' * 40}").endswith("word ...")
    assert describe_candidates([], {}) == ""
