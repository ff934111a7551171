"""Needle in a haystack: keys of tests never occur in training, documents are as asked, and answers are judged right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_sov.cli import main
from megatron_sov.errors import UserError
from megatron_sov.mcore.cpu import open_door
from megatron_sov.obs.events import EVENTS, EventLog, read_events

open_door()

from megatron_sov.data.shards import open_sources  # noqa: E402
from megatron_sov.eval.needle import NeedleSuite, run_suite  # noqa: E402
from megatron_sov.eval.needle_documents import NeedleDocuments, needle_source  # noqa: E402
from megatron_sov.eval.needle_text import Haystack, NeedleForm, needle_form  # noqa: E402
from megatron_sov.generate.load import load_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def form(token_shards: Path) -> NeedleForm:
    return needle_form(token_shards / "tokenizer")


@pytest.fixture(scope="module")
def haystacks(token_shards: Path, form: NeedleForm) -> dict[str, Haystack]:
    sources = open_sources({str(token_shards): 1.0}, 1024)
    return {split: Haystack(sources, split, form.special) for split in ("train", "heldout")}


def occurrences(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i:i + len(part)] == part]


def answer_by_looking(documents: list[list[int]], last: int) -> torch.Tensor:
    """A perfect reader: what followed the longest suffix that occurred before."""
    def follow(ids: list[int]) -> int:
        for size in range(len(ids) - 1, 0, -1):
            places = occurrences(ids[:-1], ids[-size:])
            if places:
                return ids[places[0] + size]
        return -1

    return torch.tensor([[follow(d[:len(d) - k]) for k in range(last - 1, -1, -1)] for d in documents])


def test_words_are_rare_and_whole_and_read_as_english(form: NeedleForm, token_shards: Path) -> None:
    tokenizer = load_tokenizer(token_shards / "tokenizer")
    words = [tokenizer.decode([w]) for w in form.words]
    assert len(set(words)) == 64
    assert all(w[0] == " " and w[1:].isalpha() and len(w) >= 5 for w in words)
    key, value = form.draw(np.random.default_rng(0), 2, test=True)
    text = tokenizer.decode(form.statement(key, value))
    assert text == "\nThe code of" + "".join(tokenizer.decode([w]) for w in [*key, *value]) + "."
    assert tokenizer.encode(text, add_special_tokens=False) == form.statement(key, value)


def test_pairs_of_tests_and_of_training_never_mix(form: NeedleForm) -> None:
    test, train = ({tuple(p) for p in form.pairs[which].tolist()} for which in (True, False))
    assert not test & train
    assert len(test) + len(train) == 64 * 63
    assert 0.15 < len(test) / (64 * 63) < 0.25
    fewer = NeedleForm(form.opening, form.closing, form.words[::-2])
    assert {tuple(p) for p in fewer.pairs[True].tolist()} < test, "the split must not depend on which words there are"


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

    def half_right(documents: list[list[int]], last: int) -> torch.Tensor:
        found = answer_by_looking(documents, last)
        found[::4, 0] = -1  # the first sample of each cell: its first token is wrong
        found[1::4, 1] = -1  # the second: its second token
        return found

    spoilt = run_suite(suite, half_right)
    assert spoilt.accuracy == [[0.5] * 3] * 2
    assert spoilt.event("after", 7) == {"step": 7, "when": "after", "lengths": [96, 160], "depths": [0.0, 0.4, 0.9],
                                        "accuracy": [[0.5] * 3] * 2, "samples": 4, "distractors": 0, "score": 0.5}


@pytest.fixture(scope="module")
def documents(form: NeedleForm, haystacks: dict[str, Haystack]) -> NeedleDocuments:
    return NeedleDocuments(form, haystacks["train"], 256, seed=5)


def test_training_documents_ask_for_every_needle_they_state(form: NeedleForm, documents: NeedleDocuments) -> None:
    train = {tuple(p) for p in form.pairs[False].tolist()}
    counts = set()
    for i in range(40):
        ids, weights = documents.tokens(i, 0, 256).tolist(), documents.loss_weights(i, 0, 256)
        places = occurrences(ids, list(form.opening))
        num = len(places) // 2
        counts.add(num)
        size = len(form.opening)
        stated, asked = ({tuple(ids[p + size:p + size + 4]) for p in half} for half in (places[:num], places[num:]))
        assert stated == asked and len(stated) == num
        assert all(s[:2] in train and s[2:] in train for s in stated)
        answers = {p + size + k for p in places[num:] for k in (2, 3)}
        assert {int(k) for k in np.flatnonzero(weights == 30)} == answers
        unforeseeable = {p + size + k for p in places[:num] for k in range(4)}
        unforeseeable |= {p + size + k for p in places[num:] for k in (0, 1)}
        assert {int(k) for k in np.flatnonzero(weights == 0)} == unforeseeable
        assert (weights == 0.5).sum() == 256 - len(answers) - len(unforeseeable)
    assert min(counts) == 1 and max(counts) == documents.max_needles >= 8


def test_a_document_is_a_function_of_seed_and_number(form: NeedleForm, haystacks: dict[str, Haystack],
                                                      documents: NeedleDocuments) -> None:
    again, other = (NeedleDocuments(form, haystacks["train"], 256, seed=s) for s in (5, 6))
    far = len(documents.lengths) - 1
    for i in (0, 1, far):
        assert documents.lengths[i] == len(documents.tokens(i, 0, 256)) == 256
        assert np.array_equal(documents.tokens(i, 0, 256), again.tokens(i, 0, 256))
        assert np.array_equal(documents.tokens(i, 100, 30), again.tokens(i, 0, 256)[100:130])
        assert not np.array_equal(documents.tokens(i, 0, 256), other.tokens(i, 0, 256))
    assert not np.array_equal(documents.tokens(0, 0, 256), documents.tokens(1, 0, 256))


def test_mistakes_are_named(form: NeedleForm, haystacks: dict[str, Haystack], documents: NeedleDocuments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needle length 12: 1 needles and the question alone take"):
        NeedleSuite(form, haystacks["heldout"], (12,), (0.5,), 4)
    with pytest.raises(UserError, match=r"depths \[1.5\]"):
        NeedleSuite(form, haystacks["heldout"], (128,), (1.5,), 4)
    with pytest.raises(UserError, match="samples = 0 must be at least 1"):
        NeedleSuite(form, haystacks["heldout"], (128,), (0.5,), 0)
    with pytest.raises(UserError, match=r"needle\.train_share = 1\.0"):
        needle_source(documents, 1.0)
    with pytest.raises(UserError, match="needle documents of 16 tokens hold no needle"):
        needle_source(NeedleDocuments(form, haystacks["train"], 16), 0.1)
    with pytest.raises(UserError, match=r"has no readable tokenizer\.json"):
        needle_form(tmp_path)


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
    assert "--set and --nproc are for checkpoints" in capsys.readouterr().err
