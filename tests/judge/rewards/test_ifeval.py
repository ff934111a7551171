"""Reward `ifeval`: rows of the public data sets, instructions with invalid arguments, missing packages."""

import sys
from typing import Any

import nltk
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.ifeval import IfEval, load_checks, loosen_response, read_instructions
from megatron_sov.judge.rewards.reward import Refused, run_reward

pytest.importorskip("if_verifiable", reason="extra rl")
INSTRUCTIONS = [{"id": "punctuation:no_comma"},
                {"id": "length_constraints:number_words", "num_words": 3, "relation": "at least"}]


def test_all_instructions_or_the_share_count() -> None:
    row = {"response": "one, two, three", "instructions": INSTRUCTIONS}
    assert IfEval().score(row).reward == 0.0
    score = IfEval(all_or_nothing=False).score(row)
    assert (score.reward, score.components) == (
        0.5, {"0:punctuation:no_comma": False, "1:length_constraints:number_words": True})
    assert IfEval().score({**row, "response": "one two three"}).reward == 1.0
    assert IfEval().score({"response": " ", "instructions": INSTRUCTIONS[:1]}).reward == 0.0


def test_loose_accuracy_ignores_outer_lines_and_asterisks() -> None:
    row = {"response": "Sure, here:\n*yes*", "instructions": INSTRUCTIONS[:1]}
    assert (IfEval().score(row).reward, IfEval(loose=True).score(row).reward) == (0.0, 1.0)
    assert loosen_response("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb",
                                            "b"]


def test_the_columns_of_the_data_set_are_read() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "count:numbers"],
           "kwargs": [{"N": None}, {"N": 2.0, "keyword1": None}]}
    assert read_instructions(row) == [("punctuation:no_comma", {}), ("count:numbers", {"N": 2})]
    rewards = [IfEval().score({**row, "response": text}).reward for text in ("1 and 2", "1, 2", "1")]
    assert rewards == [1.0, 0.0, 0.0]
    assert len(load_checks()) == 25 + 58  # instructions of IFEval and of IFBench


@pytest.mark.each(("row", "reason"), [
    ({}, "instructions = None must be a list"), ({"instructions": []}, "must be a list"),
    ({"instructions": ["x"]}, "'x' is not known"),
    ({"instructions": [{"id": "punctuation:no_coma"}]}, "did you mean 'punctuation:no_comma'"),
    ({"instructions": [{"id": "punctuation:no_comma", "x": "1"}]}, "takes other arguments than"),
    ({"instructions": [{"id": "count:numbers"}]}, "takes other arguments than"),
    ({"instructions": [{**INSTRUCTIONS[1], "relation": "over"}]}, "cannot be checked with"),
    ({"instructions": [{**INSTRUCTIONS[1], "num_words": "3"}]}, "num_words = '3' must be a whole number"),
    ({"instructions": [{**INSTRUCTIONS[1], "num_words": -3}]}, "must be a whole number of at least 0"),
    ({"instructions": [{"id": "keywords:existence", "keywords": "word"}]}, "must be a list of texts"),
    ({"instructions": [{"id": "startend:end_checker", "end_phrase": ""}]}, "must be a text"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "as long as"),
    ({"instructions": INSTRUCTIONS, "response": "a" * 400_001}, "at most 400,000 are checked"),
])
def test_invalid_instructions_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as e:
        IfEval().score({"response": "word word", **row})
    assert reason in str(e.value)


def test_missing_nltk_data_and_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    row = {"response": "One. Two.", "instructions": [
        {"id": "length_constraints:number_sentences", "num_sentences": 2, "relation": "at least"}]}
    result = run_reward(IfEval(), row)
    assert result.status == "refused" and "python -m nltk.downloader punkt_tab" in result.reason
    monkeypatch.setitem(sys.modules, "if_verifiable.ifbench.instructions_registry", None)
    load_checks.cache_clear()
    with pytest.raises(UserError, match="is not installed; run"):
        IfEval().prepare()
    load_checks.cache_clear()
