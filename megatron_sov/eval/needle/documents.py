"""Generate training documents for retrieval (`NeedleConfig`): text with several needles, followed by
questions about the needles.

Document i is a function of (seed, i), so runs resume exactly and every process generates the same document.
Needles and questions have the form of the test, in other sentences. Answers have the largest loss weight;
unpredictable words have weight 0 (`needle.answer_weight`, `needle.text_weight`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.suite import insert_sentences
from megatron_sov.eval.needle.text import PAIR_TOKENS, Haystack, NeedleForm, Slots, draw_index, fill_slots
from megatron_sov.model.config import NeedleConfig
from megatron_sov.train.data.sources import Source

SOURCE_NAME = "needle"
NUM_DOCUMENTS = 1 << 24
MIN_DENSEST = 12
"""Maximum needles per document, if the needles fit; `needle.train_needles` overrides the default."""
LAST_NEEDLE_SHARE = 0.3
"""Share of documents whose last needle directly precedes the questions; without such documents, models never
learn the position."""


@dataclass(frozen=True)
class NeedleDocuments:
    """Documents with equal lengths (implements `data.shards.Documents`)."""

    haystacks: tuple[Haystack, ...]
    """Training text per language; a document has text and needles in a single language, drawn by size."""
    length_tokens: int
    seed: int = 0
    settings: NeedleConfig = NeedleConfig()
    """Needles, questions and loss weights."""
    is_plain = False

    def max_needles(self, form: NeedleForm) -> int:
        """Return the maximum needles in a document in a language, with at least a question."""
        num_sentences = self.length_tokens // form.needle_tokens(test=False)
        questions = self.settings.train_questions
        # by default, needles fill the share that distractors have in the test
        densest = max(MIN_DENSEST, int(self.settings.distractor_share * num_sentences))
        num_needles = self.settings.train_needles or densest
        # a question repeats a needle; up to `train_questions` needles have a question
        num_fitting = num_sentences - questions
        if num_sentences // 2 <= questions:
            num_fitting = num_sentences // 2
        return min(num_needles, num_fitting, len(form.pairs[False]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document [NUM_DOCUMENTS], without allocating the array."""
        return np.broadcast_to(np.int64(self.length_tokens), (NUM_DOCUMENTS,))

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return self._build(document)[0][start:start + count]

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return a loss weight per target token, float32."""
        return self._build(document)[1][start:start + count]

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        return np.zeros(count, np.uint8)

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def column(self, name: str, document: int, start: int, count: int) -> np.ndarray:
        raise KeyError(name)

    def routes(self, document: int, start: int, count: int) -> np.ndarray:
        raise KeyError("routes")

    def _build(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        return _build_document(self, document)


@lru_cache(maxsize=8)
def _build_document(documents: NeedleDocuments, document: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `tokens` [length] int64 and loss weights [length] float32; each question repeats a needle."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((documents.seed, document))))
    haystack = documents.haystacks[draw_index(generator, [sum(h.sizes) for h in documents.haystacks])]
    form, settings = haystack.form, documents.settings
    slots = form.draw_sentence(generator, test=False)
    num_needles = int(generator.integers(1, documents.max_needles(form) + 1))
    keys, values = (form.draw(generator, num_needles, test=False) for _ in range(2))
    statements = [fill_slots(slots, key, value) for key, value in zip(keys, values, strict=True)]
    num_questions = min(num_needles, settings.train_questions)
    sentence_tokens = (num_needles + num_questions) * len(statements[0])
    text = haystack.text(generator, documents.length_tokens - sentence_tokens)
    positions = np.sort(generator.integers(0, len(text) + 1, num_needles))
    # shuffle the questions: copying the context in order must not suffice
    question_order = generator.permutation(num_needles)
    if generator.random() < LAST_NEEDLE_SHARE:
        # Positions are sorted: move the last needle to the end of the text, and ask for it first.
        positions[-1] = len(text)
        others = question_order[question_order != num_needles - 1]
        question_order = np.concatenate([[num_needles - 1], others])
    statement_weights = _compute_weights(settings, slots, (0.0, 0.0))
    question_weights = _compute_weights(settings, slots, (0.0, settings.answer_weight))
    text_weights = np.full(len(text), settings.text_weight, np.float32)
    tokens = insert_sentences(text, statements, positions.tolist())
    weights = insert_sentences(text_weights, [statement_weights] * num_needles, positions.tolist())
    questions = (statements[i] for i in question_order[:num_questions])
    weights_of_questions = [question_weights] * num_questions
    return np.concatenate([tokens, *questions]), np.concatenate([weights, *weights_of_questions])


def _compute_weights(settings: NeedleConfig, slots: Slots, pair_weights: Sequence[float]) -> np.ndarray:
    """Return the loss weights of a sentence with the given weights for its key and value tokens."""
    parts = [np.full(len(slots[0]), settings.text_weight, np.float32)]
    for weight, slot_text in zip(pair_weights, slots[1:], strict=True):
        parts += [np.full(PAIR_TOKENS, weight, np.float32),
                  np.full(len(slot_text), settings.text_weight, np.float32)]
    return np.concatenate(parts)


def build_needle_source(documents: NeedleDocuments, share: float, name: str = SOURCE_NAME) -> Source:
    """Wrap the documents as a source with a sample share of `share`, next to data with a total share of 1.
    Raises `UserError`: documents are too short for a needle."""
    for form in (haystack.form for haystack in documents.haystacks):
        if documents.max_needles(form) < 1:
            raise UserError(f"needle documents of {documents.length_tokens} tokens are too short for a "
                            f"needle and its question in {form.language} "
                            f"({2 * form.needle_tokens(test=False)} tokens); train on longer samples or set "
                            "needle.train_share=0")
    return Source(
        name=name, artifact=None, format="text", prefixes={}, share=share / (1 - share),
        train_documents=documents,
        num_tokens={"train": NUM_DOCUMENTS * documents.length_tokens})
