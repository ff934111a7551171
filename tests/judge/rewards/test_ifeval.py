"""IFEval's checks, verdict by verdict against lm-evaluation-harness.

`ifeval_verdicts.json` holds what lm-eval's own code (commit 4e7e0d47, lm_eval/tasks/ifeval) said of each
text, strict and loose: N no, L loosely alone, B both.  Sentences are not among them: lm-eval cuts them with a
model.
`ifbench_verdicts.json` is the same of IFBench.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from megatron_sov.judge.rewards.ifbench import FORM_CHECKS, NEEDS_MORE, WORD_CHECKS, sentences, tokens
from megatron_sov.judge.rewards.ifeval import CHECKS, IfEval, checked, instructions_of, loosened
from megatron_sov.judge.rewards.instruction_checks import (
    CHECKS as IFEVAL_CHECKS, sentences as counted_sentences)
from megatron_sov.judge.rewards.reward import Refused, judged

NEEDS_LANGUAGE = {"language:response_language", "change_case:english_capital",
                  "change_case:english_lowercase"}
RECORDED = json.loads((Path(__file__).parent / "ifeval_verdicts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "arguments", "verdicts"), RECORDED["verdicts"], ids=lambda v: str(v)[:60])
def test_verdicts_are_those_of_lm_eval(name: str, arguments: dict, verdicts: str) -> None:
    found = ""
    for text in RECORDED["texts"]:
        strict = bool(text.strip()) and checked(name, text, arguments)
        loose = any(t.strip() and checked(name, t, arguments) for t in loosened(text))
        found += "NSLB"[strict + 2 * loose]
    assert found == verdicts


def test_all_25_are_there() -> None:
    assert len(IFEVAL_CHECKS) == 25
    recorded = {name for name, *_ in RECORDED["verdicts"]}
    assert set(IFEVAL_CHECKS) - recorded == {"length_constraints:number_sentences"}


@pytest.mark.parametrize(("text", "count"), [
    ("One. Two! Three?", 3), ("Mr. Smith and Dr. No met at 3.14 p.m. on example.com. They left.", 2),
    ("no end", 1),
    ('He said "Stop." Then he left.', 2), ("", 0), ("...", 0), ("하나입니다. 둘입니다.", 2),
    ("First line\nsame sentence.", 1)])
def test_sentences_are_counted_by_rules(text: str, count: int) -> None:
    assert len(counted_sentences(text)) == count


ASKED = [{"id": "punctuation:no_comma"}, {"id": "length_constraints:number_words", "num_words": 3,
                                          "relation": "at least"}]


def test_all_have_to_be_followed_or_the_share_counts() -> None:
    row = {"response": "one, two, three", "instructions": ASKED}
    assert IfEval().score(row).reward == 0.0
    score = IfEval(all_or_nothing=False).score(row)
    assert (score.reward, score.components) == (
        0.5, {"0:punctuation:no_comma": False, "1:length_constraints:number_words": True})
    assert IfEval().score({**row, "response": "one two three"}).reward == 1.0


def test_the_columns_of_the_data_set_are_read() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
           "kwargs": [{"num_bullets": None}, {"num_bullets": 2, "relation": None}]}
    assert instructions_of(row) == [("punctuation:no_comma", {}),
                                    ("detectable_format:number_bullet_lists", {"num_bullets": 2})]


@pytest.mark.parametrize(("row", "reason"), [
    ({}, "instructions = None must be a list"), ({"instructions": []}, "must be a list"),
    ({"instructions": ["x"]}, "'x' is not known"),
    ({"instructions": [{"id": "punctuation:no_coma"}]}, "did you mean 'punctuation:no_comma'"),
    ({"instructions": [{"id": "punctuation:no_comma", "x": 1}]}, "takes other arguments than"),
    ({"instructions": [{"id": "length_constraints:number_words", "num_words": 3, "relation": "over"}]},
     "relation = 'over'"),
    ({"instructions": [{"id": "length_constraints:number_words", "num_words": "3", "relation": "at least"}]},
     "num_words = '3' must be a whole number"),
    ({"instructions": [{"id": "length_constraints:number_paragraphs", "num_paragraphs": "1"}]},
     "num_paragraphs = '1' must be a whole number"),
    ({"instructions": [{"id": "keywords:existence", "keywords": "word"}]}, "must be a list of texts"),
    ({"instructions": [{"id": "length_constraints:number_words", "num": 3}]}, "takes other arguments than"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "as long as"),
    ({"instructions": ASKED, "response": "a" * 400_001}, "at most 400,000 are checked"),
])
def test_rows_that_ask_for_nothing_sound_are_refused(row: dict, reason: str) -> None:
    with pytest.raises(Refused) as e:
        IfEval().score({"response": "word word", **row})
    assert reason in str(e.value)


def test_languages_need_langdetect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)  # as where it is not installed
    row = {"response": "eins zwei", "instructions": [{"id": "language:response_language", "language": "de"}]}
    assert "pip install langdetect" in judged(IfEval(), row).reason


@pytest.mark.parametrize("text", ["<" * 100_000, "*" * 100_000, "\n" * 100_000, "[" * 100_000, "a." * 50_000])
def test_hostile_responses_end_soon(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.judge.rewards.patterns.TIME_LIMIT_S", 0.1)
    begin_s = time.process_time()
    for name, arguments, _ in RECORDED["verdicts"]:
        if name not in NEEDS_LANGUAGE:
            assert judged(IfEval(), {"response": text, "instructions": [{"id": name,
                                                                         **arguments}]}).status in (
                "scored", "timeout")
    counted_sentences(text)
    assert time.process_time() - begin_s < 60


IFBENCH = json.loads(Path(__file__).with_name("ifbench_verdicts.json").read_text(encoding="utf-8"))
OURS = {**WORD_CHECKS, **FORM_CHECKS}


@pytest.mark.parametrize("name", sorted(OURS))
def test_verdicts_are_those_of_ifbench(name: str) -> None:
    cases = IFBENCH[name]
    assert {followed for *_, followed in cases} == {True, False}
    wrong = [(arguments, response, followed) for arguments, response, followed in cases
             if (bool(response.strip()) and checked(name, response, arguments)) != followed]
    assert wrong == []


def test_all_58_are_known_beside_ifevals_25() -> None:
    assert len(OURS) + len(NEEDS_MORE) == 58 and len(CHECKS) == len(OURS) + 25
    assert not set(OURS) & set(IFEVAL_CHECKS)


@pytest.mark.parametrize("name", sorted(NEEDS_MORE))
def test_what_would_need_a_download_is_refused_and_says_so(name: str) -> None:
    found = judged(IfEval(), {"response": "a", "instructions": [{"id": name}]})
    assert found.status == "refused" and NEEDS_MORE[name] in found.reason


def test_a_row_of_the_data_set_is_read_as_it_is() -> None:
    row = {"instruction_id_list": ["count:numbers", "format:output_template"],
           "kwargs": [{"N": 2, "keyword1": None}, {"N": None, "keyword1": None}]}
    text = "My Answer: 1,000 My Conclusion: {} Future Outlook: good"
    found = [judged(IfEval(), {**row, "response": response}).reward
             for response in (text.format("2.5"), text.format("none"), "1,000 and 2")]
    assert found == [1.0, 0.0, 0.0]


def test_an_instruction_without_its_argument_is_refused() -> None:
    found = judged(IfEval(), {"response": "a", "instructions": [{"id": "count:numbers"}]})
    assert found.status == "refused" and "takes other arguments" in found.reason


@pytest.mark.parametrize(("text", "parts"), [
    ('He said "Stop!" Then he left.', ['He said "Stop!"', "Then he left."]),
    ("Dr. No paid 3.50 e.g. for tea. Why? So.", ["Dr. No paid 3.50 e.g. for tea.", "Why?", "So."]),
    ("Well... maybe. Well... No.", ["Well... maybe.", "Well...", "No."]),
    ("1. One\n2. Two", ["1.", "One\n2.", "Two"]), ("", [])])
def test_sentences_keep_their_marks(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_words_are_cut_as_a_treebank_has_them() -> None:
    assert tokens("I can't, it's (well-known) 1,000... \"so\"") == [
        "I", "ca", "n't", ",", "it", "'s", "(", "well-known", ")", "1,000", "...", '"', "so", '"']


@pytest.mark.parametrize("text", ['"(' * 10_000, "a\n" * 10_000, ".?" * 10_000, "Question 1 " * 2_000])
def test_hostile_responses_end_soon_of_ifbench(text: str) -> None:
    begin_s = time.process_time()
    for name in sorted(OURS):
        for arguments, *_ in IFBENCH[name][:1]:
            asked = [{"id": name, **arguments}]
            assert judged(IfEval(), {"response": text, "instructions": asked}).status in ("scored", "timeout")
    assert time.process_time() - begin_s < 30
