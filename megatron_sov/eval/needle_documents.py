"""Documents that teach retrieval: text with several needles, each asked again at the end; made on the fly.

Document i is a function of (seed, i), so runs resume exactly and every process makes the same.  The answers weigh most in the
loss, and words that nothing foretells weigh nothing (`needle.answer_weight`, `needle.text_weight`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sov.config import NeedleConfig
from megatron_sov.data.shards import Source
from megatron_sov.errors import UserError
from megatron_sov.eval.haystack import Haystack, pick
from megatron_sov.eval.needle_text import NeedleForm, Slots, fill

SOURCE_NAME = "needle"
NUM_DOCUMENTS = 1 << 24
MIN_DENSEST = 12
"""Needles of the densest documents, if they fit, where settings leave their number open."""
LAST_NEEDLE_SHARE = 0.3
"""Part of the documents whose last needle stands right before the questions; without them that place is never learned."""


@dataclass(frozen=True)
class NeedleDocuments:
    """Documents of one length (a `data.shards.Documents`)."""

    haystacks: tuple[Haystack, ...]
    """Training text, one of each language; drawn by size, needles and text of a document are of one language."""
    length_tokens: int
    """Tokens of each document."""
    seed: int = 0
    """Of everything random."""
    settings: NeedleConfig = NeedleConfig()
    """Needles, questions and loss weights of a document."""
    is_plain = False

    def max_needles(self, form: NeedleForm) -> int:
        """Return how many needles a document of a language holds at most, with as many questions as settings allow."""
        statement = form.phrase_tokens("statement", test=False)
        room, questions = self.length_tokens // statement, self.settings.train_questions
        wanted = self.settings.train_needles or max(MIN_DENSEST, int(self.settings.distractor_share * room))
        return min(wanted, room // 2 if room // 2 <= questions else room - questions, len(form.pairs[False]))

    @staticmethod
    def pair_tokens(form: NeedleForm) -> int:
        """Return the tokens of a needle and its question."""
        return 2 * form.phrase_tokens("statement", test=False)

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
        """Return token types, uint8: all text."""
        return np.zeros(count, np.uint8)

    def _make(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        return _document(self, document)


@lru_cache(maxsize=8)
def _document(made: NeedleDocuments, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's tokens [length] int64 and weights [length] float32."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((made.seed, document))))
    haystack = made.haystacks[pick(generator, [sum(h.sizes) for h in made.haystacks])]
    form = haystack.form
    sentence = form.draw_sentences(generator, test=False).statement
    num_needles = int(generator.integers(1, made.max_needles(form) + 1))
    keys, values = (form.draw(generator, num_needles, test=False) for _ in range(2))
    statements = [np.array(fill(sentence, key, value), np.int64) for key, value in zip(keys, values, strict=True)]
    num_asked = min(num_needles, made.settings.train_questions)
    text = haystack.text(generator, made.length_tokens - (num_needles + num_asked) * len(statements[0]))
    places = np.sort(generator.integers(0, len(text) + 1, num_needles))
    asked = generator.permutation(num_needles)
    if generator.random() < LAST_NEEDLE_SHARE:
        places[-1] = len(text)
        asked = np.concatenate([[num_needles - 1], asked[asked != num_needles - 1]])
    weights_of = made.settings
    stated, answered = (_statement_weights(weights_of, sentence, value) for value in (0.0, weights_of.answer_weight))
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    last = 0
    for statement, place in zip(statements, places, strict=True):
        ids += [text[last:place], statement]
        weights += [np.full(place - last, weights_of.text_weight, np.float32), stated]
        last = place
    ids.append(text[last:])
    weights.append(np.full(len(text) - last, weights_of.text_weight, np.float32))
    for i in asked[:num_asked]:
        ids.append(statements[i])
        weights.append(answered)
    return np.concatenate(ids), np.concatenate(weights)


def _statement_weights(settings: NeedleConfig, sentence: Slots, value_weight: float) -> np.ndarray:
    """Return the weights of a needle's tokens: key words are anybody's guess, a value only where it was stated before."""
    opening, between, closing = (np.full(len(part), settings.text_weight, np.float32) for part in sentence)
    return np.concatenate([opening, np.zeros(2, np.float32), between, np.full(2, value_weight, np.float32), closing])


def needle_source(documents: NeedleDocuments, share: float, name: str = SOURCE_NAME) -> Source:
    """Return the documents as a source whose share of the samples is `share`, beside data of total share 1.

    Raises:
        UserError: documents are too short for a needle.
    """
    for form in (h.form for h in documents.haystacks):
        if documents.max_needles(form) < 1:
            raise UserError(f"needle documents of {documents.length_tokens} tokens hold no needle with its question in "
                            f"{form.language} ({documents.pair_tokens(form)} tokens); train on longer samples or set "
                            "needle.train_share=0")
    return Source(
        name=name, artifact=None, is_chat=False, prefixes={}, share=share / (1 - share), made=documents,
        num_tokens={"train": NUM_DOCUMENTS * documents.length_tokens})
