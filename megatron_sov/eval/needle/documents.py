"""Documents that teach retrieval: text with several needles and questions about them at the
end; made on the fly.

Document i is a function of (seed, i), so runs resume exactly and every process makes the same.  Each has one
of the kinds of the test (`needle.train_kinds`, else `needle.kinds`) and tells and asks as the test does, in
other sentences.  The answers weigh most in the loss, and words that nothing foretells weigh nothing
(`needle.answer_weight`, `needle.text_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.suite import (
    PAIR_TOKENS, PHRASES_OF, make_plan, needles_asked, place_told, weave)
from megatron_sov.eval.needle.text import Haystack, NeedleForm, Sentences, Slots, fill, pick
from megatron_sov.model.config import NeedleConfig, NeedleKind
from megatron_sov.train.data.token_shards import Source

SOURCE_NAME = "needle"
NUM_DOCUMENTS = 1 << 24
MIN_DENSEST = 12
"""Needles of the densest documents, if they fit, where settings leave their number open."""
LAST_NEEDLE_SHARE = 0.3
"""Part of the documents whose last needle stands right before the questions;
without them that place is never learned."""


@dataclass(frozen=True)
class NeedleDocuments:
    """Documents of one length (a `data.shards.Documents`)."""

    haystacks: tuple[Haystack, ...]
    """Training text, one of each language; drawn by size, needles and text of a document
    are of one language."""
    length_tokens: int
    seed: int = 0
    settings: NeedleConfig = NeedleConfig()
    """Needles, questions and loss weights of a document."""
    is_plain = False

    def max_needles(self, kind: NeedleKind, form: NeedleForm) -> int:
        """Return how many needles a document of a kind and language holds at most,
        beside at least one question."""
        statement, question = _told_tokens(kind, form), _question_tokens(kind, form)
        room, questions = self.length_tokens // statement, self.settings.train_questions
        # Without a number of their own, needles fill the share that the test's distractors have.
        wanted = self.settings.train_needles or max(MIN_DENSEST, int(self.settings.distractor_share * room))
        if needles_asked(kind) == 1:  # every needle is asked for while questions last
            return min(wanted, room // 2 if room // 2 <= questions else room - questions,
                       len(form.pairs[False]))
        return min(wanted, (self.length_tokens - question) // statement, len(form.pairs[False]) // 2)

    def max_questions(self, kind: NeedleKind, form: NeedleForm, num_needles: int) -> int:
        """Return how many questions, each for needles of its own, a document with so many
        needles has at most."""
        room = (self.length_tokens - num_needles * _told_tokens(kind, form)) // _question_tokens(kind, form)
        return min(num_needles // needles_asked(kind), self.settings.train_questions, room)

    def least_tokens(self, kind: NeedleKind, form: NeedleForm) -> int:
        return needles_asked(kind) * _told_tokens(kind, form) + _question_tokens(kind, form)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, [NUM_DOCUMENTS], without memory for them."""
        return np.broadcast_to(np.int64(self.length_tokens), (NUM_DOCUMENTS,))

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids, int64."""
        return self._make(document)[0][start:start + count]

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return each token's weight as a target, float32."""
        return self._make(document)[1][start:start + count]

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.zeros(count, np.uint8)

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        raise KeyError(name)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        raise KeyError("routes")

    def _make(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        return _document(self, document)


def _told_tokens(kind: NeedleKind, form: NeedleForm) -> int:
    return form.phrase_tokens(PHRASES_OF[kind][0], test=False)


def _question_tokens(kind: NeedleKind, form: NeedleForm) -> int:
    """Return the tokens of a question with its answer; where one needle is asked for,
    both are the needle again."""
    asked = needles_asked(kind)
    return form.phrase_tokens(PHRASES_OF[kind][1], test=False) + (0 if asked == 1 else asked * PAIR_TOKENS)


@lru_cache(maxsize=8)
def _document(made: NeedleDocuments, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's tokens [length] int64 and weights [length] float32.

    The kind is drawn apart from everything else, so that a document of a kind is the same whatever
    other kinds there are.
    """
    kinds = made.settings.train_kinds or made.settings.kinds
    drawn = np.random.Generator(np.random.Philox(
        np.random.SeedSequence((made.seed, document), spawn_key=(1,))))
    kind = kinds[int(drawn.integers(len(kinds)))]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((made.seed, document))))
    haystack = made.haystacks[pick(generator, [sum(h.sizes) for h in made.haystacks])]
    sentences = haystack.form.draw_sentences(generator, test=False)
    make = _one_needle_each if needles_asked(kind) == 1 else _several_needles_each
    return make(made, kind, haystack, sentences, generator)


def _one_needle_each(made: NeedleDocuments, kind: NeedleKind, haystack: Haystack, sentences: Sentences,
                     generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a document whose questions repeat needles up to the value, and go on like them."""
    form, settings, slots = haystack.form, made.settings, sentences.statement
    num_needles = int(generator.integers(1, made.max_needles(kind, form) + 1))
    keys, values = (form.draw(generator, num_needles, test=False) for _ in range(2))
    statements = [fill(slots, key, value) for key, value in zip(keys, values, strict=True)]
    num_asked = min(num_needles, settings.train_questions)
    text = haystack.text(generator, made.length_tokens - (num_needles + num_asked) * len(statements[0]))
    places = np.sort(generator.integers(0, len(text) + 1, num_needles))
    # Asked in another order than told: copying the context in order must not be enough.
    asked = generator.permutation(num_needles)
    if generator.random() < LAST_NEEDLE_SHARE:
        # Places are sorted, so this is the last needle; it is asked for first.
        places[-1] = len(text)
        asked = np.concatenate([[num_needles - 1], asked[asked != num_needles - 1]])
    answered = _weights(settings, slots, (0.0, settings.answer_weight))
    return _joined(settings, text, statements, places.tolist(), slots,
                   [statements[i] for i in asked[:num_asked]], answered)


def _several_needles_each(made: NeedleDocuments, kind: NeedleKind, haystack: Haystack, sentences: Sentences,
                          generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a document in the manner of a test's examples, with several questions instead of one."""
    form, settings, each = haystack.form, made.settings, needles_asked(kind)
    told_slots, question_slots = (getattr(sentences, name) for name in PHRASES_OF[kind])
    num_needles = int(generator.integers(each, made.max_needles(kind, form) + 1))
    num_questions = int(generator.integers(1, made.max_questions(kind, form, num_needles) + 1))
    plan = make_plan(kind, form, sentences, generator, num_questions,
                     num_needles - each * num_questions, test=False)
    text = haystack.text(generator, made.length_tokens - plan.tokens)
    starts = generator.integers(0, len(text) + 1, num_questions)
    if generator.random() < LAST_NEEDLE_SHARE:
        # Places are drawn from all of the text, so the last one would almost never come up.
        starts[0] = len(text)
    told, places = place_told(plan, generator, starts.tolist(), len(text))
    asked = [[*question, *answer.ravel().tolist()]
             for question, answer in zip(plan.questions, plan.answers, strict=True)]
    question = _weights(settings, question_slots, (0.0,) * (len(question_slots) - 1))
    answered = np.concatenate([question, np.full(each * PAIR_TOKENS, settings.answer_weight, np.float32)])
    return _joined(settings, text, told, places, told_slots, asked, answered)


def _joined(settings: NeedleConfig, text: np.ndarray, told: Sequence[list[int]], places: Sequence[int],
            told_slots: Slots, asked: Sequence[list[int]],
            answered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and weights of a text with what is told at places in it and what is asked, with its
    answers, at the end."""
    stated = _weights(settings, told_slots, (0.0, 0.0))
    around = np.full(len(text), settings.text_weight, np.float32)
    return (np.concatenate([weave(text, told, places), *asked]),
            np.concatenate([weave(around, [stated] * len(told), places), *[answered] * len(asked)]))


def _weights(settings: NeedleConfig, slots: Slots, of_pairs: Sequence[float]) -> np.ndarray:
    """Return the weights of a phrase's tokens, those of its pairs given: whatever stands first in them
    is anybody's guess."""
    parts = [np.full(len(slots[0]), settings.text_weight, np.float32)]
    for weight, behind in zip(of_pairs, slots[1:], strict=True):
        parts += [np.full(PAIR_TOKENS, weight, np.float32),
                  np.full(len(behind), settings.text_weight, np.float32)]
    return np.concatenate(parts)


def needle_source(documents: NeedleDocuments, share: float, name: str = SOURCE_NAME) -> Source:
    """Return the documents as a source whose share of the samples is `share`, beside data of total share 1.

    Raises:
        UserError: documents are too short for a needle.
    """
    settings = documents.settings
    for kind in settings.train_kinds or settings.kinds:
        if 0 < settings.train_needles < needles_asked(kind):
            raise UserError(f"needle.train_needles = {settings.train_needles}: "
                            f"a question of kind {kind} asks for {needles_asked(kind)} needles; "
                            "allow as many, or set needle.train_kinds to other kinds")
        for form in (h.form for h in documents.haystacks):
            if documents.max_needles(kind, form) < needles_asked(kind):
                raise UserError(f"needle documents of {documents.length_tokens} tokens hold no needle with "
                                f"its question of kind {kind} in {form.language} "
                                f"({documents.least_tokens(kind, form)} tokens); "
                                "train on longer samples or set needle.train_share=0")
    return Source(
        name=name, artifact=None, format="text", prefixes={}, share=share / (1 - share), made=documents,
        num_tokens={"train": NUM_DOCUMENTS * documents.length_tokens})
