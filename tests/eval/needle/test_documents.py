"""Documents that teach retrieval: what they ask follows from what they tell, weights are on the answers, and
a number gives the document."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_sov.eval.needle.documents import NeedleDocuments
from megatron_sov.eval.needle.suite import PHRASES_OF, make_example
from megatron_sov.eval.needle.text import Haystack, NeedleForm, Sentences, open_haystacks, phrases
from megatron_sov.model.config import NeedleConfig, NeedleKind
from megatron_sov.train.data.token_shards import open_sources

KINDS: tuple[NeedleKind, ...] = ("multi-value", "multi-query", "variable-tracking")
"""Those whose questions ask for several needles."""
WORDS = r"((?: [^\W\d_]+){%d})"


@pytest.fixture(scope="module")
def documents(haystacks: dict[str, Haystack]) -> NeedleDocuments:
    return NeedleDocuments((haystacks["train"],), 256, seed=5)


def statements_in(form: NeedleForm, ids: list[int]) -> list[tuple[int, tuple[int, ...]]]:
    """Place and words of every statement; a document has sentences of one form."""
    for sentences in form.sentences[False]:
        opening, _, closing = sentences.statement
        size, width = len(opening), len(opening) + 4 + len(closing)
        found = [(i + size, tuple(ids[i + size:i + size + 4])) for i in range(len(ids) - width + 1)
                 if tuple(ids[i:i + size]) == opening and tuple(ids[i + size + 4:i + width]) == closing]
        if len(found) > 1 and set(found[-1][1]) <= set(form.words):
            return found
    raise AssertionError("no sentence of a training form")


def test_training_documents_ask_for_every_needle_they_state(form: NeedleForm,
                                                            documents: NeedleDocuments) -> None:
    train = {tuple(p) for p in form.pairs[False].tolist()}
    counts = set()
    for i in range(40):
        ids, weights = documents.tokens(i, 0, 256).tolist(), documents.loss_weights(i, 0, 256)
        found = statements_in(form, ids)
        num = len(found) // 2
        counts.add(num)
        stated, asked = ({words for _, words in half} for half in (found[:num], found[num:]))
        assert stated == asked and len(stated) == num
        assert all(s[:2] in train and s[2:] in train for s in stated)
        answers = {p + k for p, _ in found[num:] for k in (2, 3)}
        assert {int(k) for k in np.flatnonzero(weights == 30)} == answers
        unforeseeable = {p + k for p, _ in found[:num] for k in range(4)} | {p + k for p, _ in found[num:]
                                                                             for k in (0, 1)}
        assert {int(k) for k in np.flatnonzero(weights == 0)} == unforeseeable
        assert (weights == 0.5).sum() == 256 - len(answers) - len(unforeseeable)
    assert min(counts) == 1 and max(counts) == documents.max_needles("multi-key", form) >= 8


def test_distractors_and_weights_are_as_set(form: NeedleForm, haystacks: dict[str, Haystack]) -> None:
    settings = NeedleConfig(train_needles=10, train_questions=3, answer_weight=7.0, text_weight=0.0)
    made = NeedleDocuments((haystacks["train"],), 256, seed=5, settings=settings)
    counts = set()
    for i in range(40):
        ids, weights = made.tokens(i, 0, 256), made.loss_weights(i, 0, 256)
        asked = int((weights == 7).sum()) // 2
        assert (weights > 0).sum() == 2 * asked and len(ids) == 256
        if asked < 3:  # then every needle is asked for
            assert len(statements_in(form, ids.tolist())) == 2 * asked
        else:
            counts.add(len(statements_in(form, ids.tolist())) - 3)
    assert min(counts) >= 3 and max(counts) == 10 == made.max_needles("multi-key", form)


def test_languages_have_documents_by_the_size_of_their_text(token_shards: Path) -> None:
    sources = open_sources({str(token_shards): 1.0}, 1024)
    code, other = (next(s for s in sources if s.name == name) for name in ("first", "second"))
    haystacks = open_haystacks(sources, "train", token_shards / "tokenizer", told={"second": "english"})
    made = NeedleDocuments(haystacks, 256, seed=1)
    forms = {h.language: h.form for h in haystacks}
    opening = {name: {s.statement[0] for s in form.sentences[False]} for name, form in forms.items()}
    counts = dict.fromkeys(opening, 0)
    for i in range(60):
        ids = made.tokens(i, 0, 256).tolist()
        for name, starts in opening.items():
            counts[name] += any(ids[k:k + len(o)] == list(o) for o in starts for k in range(256))
    share = code.num_tokens["train"] / (code.num_tokens["train"] + other.num_tokens["train"])
    assert counts["code"] + counts["english"] >= 60 and counts["code"] / 60 == pytest.approx(share, abs=0.2)


def test_a_document_is_a_function_of_seed_and_number(haystacks: dict[str, Haystack],
                                                     documents: NeedleDocuments) -> None:
    again, other = (NeedleDocuments((haystacks["train"],), 256, seed=s) for s in (5, 6))
    far = len(documents.lengths) - 1
    for i in (0, 1, far):
        assert documents.lengths[i] == len(documents.tokens(i, 0, 256)) == 256
        assert np.array_equal(documents.tokens(i, 0, 256), again.tokens(i, 0, 256))
        assert np.array_equal(documents.tokens(i, 100, 30), again.tokens(i, 0, 256)[100:130])
        assert not np.array_equal(documents.tokens(i, 0, 256), other.tokens(i, 0, 256))
    assert not np.array_equal(documents.tokens(0, 0, 256), documents.tokens(1, 0, 256))


@pytest.fixture(scope="module")
def tokenizer(token_shards: Path) -> Tokenizer:
    return Tokenizer.from_file(str(token_shards / "tokenizer/tokenizer.json"))


def made_of(haystacks: dict[str, Haystack], *kinds: NeedleKind, length: int = 256,
            **settings: Any) -> NeedleDocuments:
    return NeedleDocuments((haystacks["train"],), length, seed=5,
                           settings=NeedleConfig(kinds=kinds, **settings))


def solved(kind: NeedleKind, told: list[tuple[str, str]], asked: list[str]) -> list[str]:
    """The answer to a question, worked out from the told pairs alone."""
    if kind == "multi-value":
        return [value for key, value in told if key == asked[0]]
    held = dict(told)
    if kind == "multi-query":
        return [held[key] for key in asked]

    def root(name: str) -> str:
        return root(held[name]) if name in held else name

    return [name for name, _ in told if root(name) == asked[0]]


def read(kind: NeedleKind, text: str, *,
         test: bool) -> tuple[list[tuple[str, str]], list[tuple[list[str], str]]]:
    """What a text tells, and its questions with the words behind each; read from the phrases as
    people write them."""
    for form in phrases("code", test=test):
        told, question = ((WORDS % 2).join(map(re.escape, getattr(form, name).split("{}")))
                          for name in PHRASES_OF[kind])
        found = list(re.finditer(question + WORDS % 8, text))
        if found:
            ends = [*(m.start() for m in found[1:]), len(text)]
            assert [m.end() for m in found] == ends, ("questions follow one another, "
                                                      "and nothing follows the last answer")
            return re.findall(told, text), [(list(m.groups()[:-1]), m.groups()[-1]) for m in found]
    raise AssertionError(f"no question of a {kind} in {text!r}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_the_text_comes_to_the_answers(kind: NeedleKind, haystacks: dict[str, Haystack],
                                                   tokenizer: Tokenizer) -> None:
    """Answers are right, they alone weigh most, and what nothing foretells weighs nothing."""
    documents = made_of(haystacks, kind, answer_weight=7.0, text_weight=0.25)
    counts = set()
    for i in range(30):
        ids, weights = documents.tokens(i, 0, 256), documents.loss_weights(i, 0, 256)
        told, questions = read(kind, tokenizer.decode(ids.tolist()), test=False)
        for asked, answer in questions:
            assert answer == "".join(solved(kind, told, asked)) and len(answer.split()) == 8
        assert len({answer for _, answer in questions}) == len(questions)
        assert tokenizer.decode(ids[weights == 7].tolist()) == "".join(answer for _, answer in questions)
        guesses = ["".join(pair) for pair in told] + ["".join(asked) for asked, _ in questions]
        assert tokenizer.decode(ids[weights == 0].tolist()) == "".join(guesses)
        assert set(weights.tolist()) == {0.0, 0.25, 7.0} and len(ids) == len(weights) == 256
        counts.add((len(told), len(questions)))
    most = documents.max_needles(kind, documents.haystacks[0].form)
    assert min(counts)[0] == 4 and max(counts)[0] == most >= 12
    assert {questions for _, questions in counts} >= {1, 2}
    assert {needles - 4 * questions > 0 for needles, questions in counts} == {True, False}, (
        "with and without distractors")


@pytest.mark.parametrize("kind", KINDS)
def test_tests_tell_and_ask_in_the_same_way(kind: NeedleKind, haystacks: dict[str, Haystack],
                                            tokenizer: Tokenizer) -> None:
    """The reader of the documents reads the test's examples, in the test's phrases,
    and finds neither's in the other's."""
    for depth in (0.0, 0.4, 1.0):
        example = make_example(kind, haystacks["heldout"], np.random.default_rng(1), 300, depth, 6)
        text = tokenizer.decode([*example.prompt, *(token for pair in example.answer for token in pair)])
        told, ((asked, answer),) = read(kind, text, test=True)
        assert answer == "".join(solved(kind, told, asked)) and len(told) == 10
        with pytest.raises(AssertionError, match="no question"):
            read(kind, text, test=False)
    document = tokenizer.decode(made_of(haystacks, kind).tokens(0, 0, 256).tolist())
    with pytest.raises(AssertionError, match="no question"):
        read(kind, document, test=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_of_a_document_is_kept_for_tests(kind: NeedleKind, haystacks: dict[str, Haystack],
                                                 form: NeedleForm) -> None:
    documents = made_of(haystacks, kind)
    train = {tuple(p) for p in form.pairs[False].tolist()}
    seen = set()
    for i in range(30):
        ids, weights = documents.tokens(i, 0, 256), documents.loss_weights(i, 0, 256)
        words = ids[weights != 0.5].reshape(-1, 2)
        seen |= {tuple(p) for p in words.tolist()}
    assert seen <= train and len(seen) > 200


class Numbers:
    """Text whose tokens count on from a random number."""

    def take(self, generator: np.random.Generator, count: int) -> np.ndarray:
        return int(generator.integers(1000)) + np.arange(count, dtype=np.int64) + 1000


def test_documents_of_single_needles_are_what_they_always_were() -> None:
    """Runs that were begun with them resume, and figures measured with them stay comparable:
    bits, not manners."""
    def sentences(k: int) -> Sentences:
        return Sentences(((k, k + 1), (), (k + 2,)), ((k, k + 3), (k + 4,)),
                         ((k, k + 5), (k + 6,), (k + 6,), (k + 6,), (k + 7,)),
                         ((k, k + 8), (k + 9,), (k + 2,)), ((k, k + 10), (k + 4,)))

    form = NeedleForm("english",
                      {True: (sentences(10), sentences(30)), False: (sentences(50), sentences(70))},
                      tuple(range(100, 164)))
    haystack = Haystack(form, (Numbers(), Numbers()), (3.0, 1.0))
    few = NeedleConfig(kinds=("single",), train_needles=9, train_questions=4, answer_weight=3.0,
                       text_weight=0.25)
    found = hashlib.sha256()
    for length, seed, settings in ((128, 0, NeedleConfig()), (500, 7, few)):
        made = NeedleDocuments((haystack, haystack), length, seed, settings)
        for i in range(30):
            found.update(made.tokens(i, 0, length).astype("<i8").tobytes())
            found.update(made.loss_weights(i, 0, length).astype("<f4").tobytes())
    assert found.hexdigest()[:16] == "0baa4718680e8a29"
