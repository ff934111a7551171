"""Needle in a haystack: documents are as asked, and answers are judged right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sov.cli import main
from megatron_sov.errors import UserError
from megatron_sov.mcore.cpu import open_door
from megatron_sov.obs.events import EVENTS, EventLog, read_events

open_door()

from megatron_sov.eval.needle import NeedleSuite, run_suite  # noqa: E402
from megatron_sov.eval.needle_text import Haystack, NeedleForm  # noqa: E402


def occurrences(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i:i + len(part)] == part]


def answer_by_looking(prompts: list[list[int]], count: int) -> list[list[int]]:
    """A perfect reader: what followed the longest suffix that occurred before, again and again."""
    def follow(ids: list[int]) -> int:
        for size in range(len(ids) - 1, 0, -1):
            places = occurrences(ids[:-1], ids[-size:])
            if places:
                return ids[places[0] + size]
        return -1

    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            ids.append(follow(ids))
        answers.append(ids[len(prompt):])
    return answers


@pytest.mark.parametrize("distractors", [0, 3])
def test_documents_of_the_test_have_their_needle_where_asked(form: NeedleForm, haystacks: dict[str, Haystack],
                                                            distractors: int) -> None:
    suite = NeedleSuite(form, haystacks["heldout"], (128, 256), (0.0, 0.5, 1.0), 4, distractors)
    for length in suite.lengths:
        for depth in suite.depths:
            for sample in range(4):
                ids = suite.document(length, depth, sample)
                assert len(ids) == length
                question = ids[-len(form.opening) - 4:-2]
                stated, asked = occurrences(ids, question)
                assert asked == length - len(question) - 2
                assert ids[stated + len(question):][:2] == ids[-2:]
                assert len(occurrences(ids, list(form.opening))) == 2 + distractors
                if not distractors:
                    assert stated == pytest.approx(depth * (asked - form.statement_tokens), abs=0.51)
                assert not set(form.special) & set(ids)
                assert tuple(question[-2:]) in {tuple(p) for p in form.pairs[True].tolist()}
    assert suite.document(128, 0.5, 0) != suite.document(128, 0.5, 1)


def test_answers_are_judged(form: NeedleForm, haystacks: dict[str, Haystack]) -> None:
    suite = NeedleSuite(form, haystacks["heldout"], (96, 160), (0.0, 0.4, 0.9), 4)
    result = run_suite(suite, answer_by_looking)
    assert result.accuracy == [[1.0] * 3] * 2 and result.score == 1.0

    def half_right(prompts: list[list[int]], count: int) -> list[list[int]]:
        found = answer_by_looking(prompts, count)
        for number, answer in enumerate(found):
            if number % 4 < 2:  # of each cell the first sample's first token and the second one's second are wrong
                answer[number % 4] = -1
        return found

    spoilt = run_suite(suite, half_right)
    assert spoilt.accuracy == [[0.5] * 3] * 2
    assert spoilt.event("after", 7) == {"step": 7, "when": "after", "lengths": [96, 160], "depths": [0.0, 0.4, 0.9],
                                        "accuracy": [[0.5] * 3] * 2, "samples": 4, "distractors": 0, "score": 0.5}


def test_mistakes_are_named(form: NeedleForm, haystacks: dict[str, Haystack]) -> None:
    with pytest.raises(UserError, match="needle length 12: 1 needles and the question alone take"):
        NeedleSuite(form, haystacks["heldout"], (12,), (0.5,), 4)
    with pytest.raises(UserError, match=r"depths \[1.5\]"):
        NeedleSuite(form, haystacks["heldout"], (128,), (1.5,), 4)
    with pytest.raises(UserError, match="samples = 0 must be at least 1"):
        NeedleSuite(form, haystacks["heldout"], (128,), (0.5,), 0)


def test_the_command_judges_checkpoints_and_folders_alike(one_rank: None, imported: dict[str, Path], hf_models: dict[str, Path],
                                                          token_shards: Path, tmp_path: Path, capsys) -> None:
    EventLog(tmp_path / EVENTS).close()
    ask = ["--data", str(token_shards), "--lengths", "64", "96", "--depths", "0", "0.9", "--samples", "3", "--run", str(tmp_path)]
    shown = []
    for folder in (imported["exaone_moe"], hf_models["exaone_moe"]):
        assert main(["eval", "needle", str(folder), *ask, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert (shown[0]["lengths"], shown[0]["depths"], shown[0]["samples"]) == ([64, 96], [0.0, 0.9], 3)
    events = list(read_events(tmp_path / EVENTS))
    assert [(e["event"], e["when"], e["step"], e["accuracy"]) for e in events] \
        == [("needle", "eval", step, shown[0]["accuracy"]) for step in (0, None)]
    assert main(["eval", "needle", str(hf_models["exaone_moe"]), *ask, "--nproc", "2"]) == 2
    assert "--set [] and --nproc 2 are for checkpoints" in capsys.readouterr().err
