"""Retrieval documents: questions repeat needles, weights are on answers, and each is a function of its
index."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megatron_sov.eval.needle.documents import NeedleDocuments
from megatron_sov.eval.needle.text import Haystack, NeedleForm, Slots, open_haystacks
from megatron_sov.model.config import NeedleConfig
from megatron_sov.train.data.sources import open_sources


@pytest.fixture(scope="module")
def documents(haystacks: dict[str, Haystack]) -> NeedleDocuments:
    return NeedleDocuments((haystacks["train"],), 256, seed=5)


def find_statements(form: NeedleForm, ids: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Return position and words of every statement; a document has sentences of one form."""
    for sentences in form.sentences[False]:
        opening, _, closing = sentences
        size, width = len(opening), len(opening) + 4 + len(closing)
        statements = [(i + size, tuple(ids[i + size:i + size + 4])) for i in range(len(ids) - width + 1)
                 if tuple(ids[i:i + size]) == opening and tuple(ids[i + size + 4:i + width]) == closing]
        if len(statements) > 1 and set(statements[-1][1]) <= set(form.words):
            return statements
    raise AssertionError("no sentence of a training form")


def test_training_documents_have_a_question_per_needle(form: NeedleForm, documents: NeedleDocuments) -> None:
    train = {tuple(p) for p in form.pairs[False].tolist()}
    counts = set()
    for i in range(40):
        ids, weights = documents.tokens(i, 0, 256).tolist(), documents.loss_weights(i, 0, 256)
        statements = find_statements(form, ids)
        num_needles = len(statements) // 2
        counts.add(num_needles)
        needles, questions = statements[:num_needles], statements[num_needles:]
        stated_words = {words for _, words in needles}
        assert stated_words == {words for _, words in questions} and len(stated_words) == num_needles
        assert all(words[:2] in train and words[2:] in train for words in stated_words)
        # a statement is two words of the key and two of the value: only the value of a question is an answer
        answers = {position + k for position, _ in questions for k in (2, 3)}
        assert {int(k) for k in np.flatnonzero(weights == 30)} == answers
        random_words = {position + k for position, _ in needles for k in range(4)}
        random_words |= {position + k for position, _ in questions for k in (0, 1)}
        assert {int(k) for k in np.flatnonzero(weights == 0)} == random_words
        assert (weights == 0.5).sum() == 256 - len(answers) - len(random_words)
    assert min(counts) == 1 and max(counts) == documents.max_needles(form) >= 8


def test_needles_and_weights_follow_settings(form: NeedleForm, haystacks: dict[str, Haystack]) -> None:
    settings = NeedleConfig(train_needles=10, train_questions=3, answer_weight=7.0, text_weight=0.0)
    needle_documents = NeedleDocuments((haystacks["train"],), 256, seed=5, settings=settings)
    counts = set()
    for i in range(40):
        ids, weights = needle_documents.tokens(i, 0, 256), needle_documents.loss_weights(i, 0, 256)
        asked_words = int((weights == 7).sum()) // 2
        assert (weights > 0).sum() == 2 * asked_words and len(ids) == 256
        if asked_words < 3:  # then every needle is asked for
            assert len(find_statements(form, ids.tolist())) == 2 * asked_words
        else:
            counts.add(len(find_statements(form, ids.tolist())) - 3)
    assert min(counts) >= 3 and max(counts) == 10 == needle_documents.max_needles(form)


def test_languages_are_drawn_by_text_size(token_shards: Path) -> None:
    sources = open_sources({str(token_shards): 1.0}, 1024)
    code, reseeded = (next(s for s in sources if s.name == name) for name in ("first", "second"))
    haystacks = open_haystacks(sources, "train", token_shards / "tokenizer",
                               source_languages={"second": "english"})
    needle_documents = NeedleDocuments(haystacks, 256, seed=1)
    forms = {h.language: h.form for h in haystacks}
    opening = {name: {slots[0] for slots in form.sentences[False]} for name, form in forms.items()}
    counts = dict.fromkeys(opening, 0)
    for i in range(60):
        ids = needle_documents.tokens(i, 0, 256).tolist()
        for name, starts in opening.items():
            counts[name] += any(ids[k:k + len(o)] == list(o) for o in starts for k in range(256))
    share = code.num_tokens["train"] / (code.num_tokens["train"] + reseeded.num_tokens["train"])
    assert counts["code"] + counts["english"] >= 60 and counts["code"] / 60 == pytest.approx(share, abs=0.2)


def test_document_is_a_function_of_seed_and_index(haystacks: dict[str, Haystack],
                                                  documents: NeedleDocuments) -> None:
    equal, reseeded = (NeedleDocuments((haystacks["train"],), 256, seed=s) for s in (5, 6))
    last = len(documents.lengths) - 1
    for i in (0, 1, last):
        assert documents.lengths[i] == len(documents.tokens(i, 0, 256)) == 256
        assert np.array_equal(documents.tokens(i, 0, 256), equal.tokens(i, 0, 256))
        assert np.array_equal(documents.tokens(i, 100, 30), equal.tokens(i, 0, 256)[100:130])
        assert not np.array_equal(documents.tokens(i, 0, 256), reseeded.tokens(i, 0, 256))
    assert not np.array_equal(documents.tokens(0, 0, 256), documents.tokens(1, 0, 256))


class CountingText:
    """Text whose tokens count up from a random number."""

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        return int(generator.integers(1000)) + np.arange(count, dtype=np.int64) + 1000


def test_single_needle_documents_are_unchanged() -> None:
    """Runs resume with equal documents, and earlier results stay comparable: bits are pinned."""
    def build_slots(k: int) -> Slots:
        return (k, k + 1), (), (k + 2,)

    test_slots, train_slots = (build_slots(10), build_slots(30)), (build_slots(50), build_slots(70))
    form = NeedleForm("english", {True: test_slots, False: train_slots}, tuple(range(100, 164)))
    haystack = Haystack(form, (CountingText(), CountingText()), (3.0, 1.0))
    few_questions = NeedleConfig(train_needles=9, train_questions=4, answer_weight=3.0, text_weight=0.25)
    statements = hashlib.sha256()
    for length, seed, settings in ((128, 0, NeedleConfig()), (500, 7, few_questions)):
        needle_documents = NeedleDocuments((haystack, haystack), length, seed, settings)
        for i in range(30):
            statements.update(needle_documents.tokens(i, 0, length).astype("<i8").tobytes())
            statements.update(needle_documents.loss_weights(i, 0, length).astype("<f4").tobytes())
    assert statements.hexdigest()[:16] == "0baa4718680e8a29"
