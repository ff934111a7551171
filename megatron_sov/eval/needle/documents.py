"""Documents that teach retrieval: text with several needles and questions about them at the
end; made on the fly.

Document i is a function of (seed, i), so runs resume exactly and every process makes the same.  A document
tells and asks as the test does, in other sentences.  The answers weigh most in the loss, and words that
nothing foretells weigh nothing (`needle.answer_weight`, `needle.text_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.suite import weave
from megatron_sov.eval.needle.text import PAIR_TOKENS, Haystack, NeedleForm, Slots, fill, pick
from megatron_sov.model.config import NeedleConfig
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

    def max_needles(self, form: NeedleForm) -> int:
        """Return how many needles a document of a language holds at most, with at least one question."""
        room, questions = self.length_tokens // form.needle_tokens(test=False), self.settings.train_questions
        # Without a number of their own, needles fill the share that the test's distractors have.
        wanted = self.settings.train_needles or max(MIN_DENSEST, int(self.settings.distractor_share * room))
        # A question repeats its needle; every needle is asked for while questions last.
        return min(wanted, room // 2 if room // 2 <= questions else room - questions,
                   len(form.pairs[False]))

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


@lru_cache(maxsize=8)
def _document(made: NeedleDocuments, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's tokens [length] int64 and weights [length] float32: its questions repeat needles
    up to the value, and go on like them."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((made.seed, document))))
    haystack = made.haystacks[pick(generator, [sum(h.sizes) for h in made.haystacks])]
    form, settings = haystack.form, made.settings
    slots = form.draw_sentence(generator, test=False)
    num_needles = int(generator.integers(1, made.max_needles(form) + 1))
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
    stated = _weights(settings, slots, (0.0, 0.0))
    answered = _weights(settings, slots, (0.0, settings.answer_weight))
    around = np.full(len(text), settings.text_weight, np.float32)
    return (np.concatenate([weave(text, statements, places.tolist()),
                            *(statements[i] for i in asked[:num_asked])]),
            np.concatenate([weave(around, [stated] * num_needles, places.tolist()), *[answered] * num_asked]))


def _weights(settings: NeedleConfig, slots: Slots, of_pairs: Sequence[float]) -> np.ndarray:
    """Return the weights of a sentence's tokens, those of its pairs given: whatever stands first in them
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
    for form in (haystack.form for haystack in documents.haystacks):
        if documents.max_needles(form) < 1:
            raise UserError(f"needle documents of {documents.length_tokens} tokens hold no needle with "
                            f"its question in {form.language} ({2 * form.needle_tokens(test=False)} tokens); "
                            "train on longer samples or set needle.train_share=0")
    return Source(
        name=name, artifact=None, format="text", prefixes={}, share=share / (1 - share), made=documents,
        num_tokens={"train": NUM_DOCUMENTS * documents.length_tokens})
