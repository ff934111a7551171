"""IFBench's checks, verdict by verdict against allenai/IFBench.

`ifbench_verdicts.json` holds what IFBench's own code (commit db69a6f, Apache-2.0) said of the cases of its
own tests and of the texts of others, with sentences cut by NLTK's punkt without its trained parameters.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_sov.rewards.ifbench import FORM_CHECKS, NEEDS_MORE, WORD_CHECKS, sentences, tokens
from megatron_sov.rewards.ifeval import CHECKS, IfEval, checked
from megatron_sov.rewards.instruction_checks import CHECKS as IFEVAL_CHECKS
from megatron_sov.rewards.reward import judged

RECORDED = json.loads((Path(__file__).parent / "ifbench_verdicts.json").read_text(encoding="utf-8"))
OURS = {**WORD_CHECKS, **FORM_CHECKS}


@pytest.mark.parametrize("name", sorted(OURS))
def test_verdicts_are_those_of_ifbench(name: str) -> None:
    cases = RECORDED[name]
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
def test_hostile_responses_end_soon(text: str) -> None:
    begin_s = time.process_time()
    for name in sorted(OURS):
        for arguments, *_ in RECORDED[name][:1]:
            asked = [{"id": name, **arguments}]
            assert judged(IfEval(), {"response": text, "instructions": asked}).status in ("scored", "timeout")
    assert time.process_time() - begin_s < 30
