"""Several tokenizers on the same texts: what they cost in context and computation, what they share,
how fast they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from tokenizer.formats.loaders import Opened
from tokenizer.report.measures import Measured
from tokenizer.report.texts import NamedText

SPEED_BYTES = 1_000_000
"""Text on which speed is measured, of all texts together."""
SPEED_ROUNDS = 2


@dataclass(frozen=True)
class ModelSize:
    """The model that a tokenizer would serve."""

    hidden_size: int
    """Width of embedding and head."""
    body_params: float
    """Parameters that each token meets, without embedding and head."""

    def embedding_params(self, vocab_size: int) -> int:
        """Return the parameters of embedding and untied head; half of them where they are tied."""
        return 2 * vocab_size * self.hidden_size

    def inference_flops_per_token(self, vocab_size: int) -> float:
        """Return FLOPs of one token forward: 2 for each parameter that it meets,
        the head's among them (arXiv 2001.08361).

        The embedding is a look-up; attention over the context is left out, as there.
        """
        return 2 * (self.body_params + vocab_size * self.hidden_size)

    def training_flops_per_token(self, vocab_size: int) -> float:
        """Return FLOPs of one token forward and backward: three times the forward pass."""
        return 3 * self.inference_flops_per_token(vocab_size)


def names_of(tokenizers: list[Opened]) -> list[str]:
    """Return a name for each tokenizer: that of its folder or file, or all of its path where
    two have the same."""
    names = [t.name for t in tokenizers]
    return [name if names.count(name) == 1 else str(t.path)
            for name, t in zip(names, tokenizers, strict=True)]


def costs(tokenizer: Opened, measured: list[Measured], first: Opened, first_measured: list[Measured],
          size: ModelSize
          ) -> dict[str, dict[str, Any]]:
    """Return the figures of one tokenizer on each text, against the first tokenizer's.

    `relative_tokens` is the cost in context, in the cache of keys and values, and in generation steps;
    `relative_flops` also counts that a larger head makes each token dearer.
    """
    ours, theirs = (size.inference_flops_per_token(t.vocab_size) for t in (tokenizer, first))
    found = {}
    for m, reference in zip(measured, first_measured, strict=True):
        relative = m.num_tokens / max(1, reference.num_tokens)
        found[m.text.name] = m.numbers() | {
            "relative_tokens": relative, "relative_flops": relative * ours / theirs,
            "inference_flops_per_mb": m.num_tokens * ours / m.text.num_bytes * 1e6,
            "training_flops_per_mb": m.num_tokens * size.training_flops_per_token(tokenizer.vocab_size)
            / m.text.num_bytes * 1e6}
    return found


def overlap(a: Opened, b: Opened) -> dict[str, Any]:
    """Return how many tokens two vocabularies share, by their bytes;
    special and added tokens are left out."""
    ours, theirs = set(a.tokens.values()), set(b.tokens.values())
    shared = len(ours & theirs)
    return {"num_shared": shared, "share_of_first": shared / max(1, len(ours)),
            "share_of_second": shared / max(1, len(theirs)), "jaccard": shared / max(1, len(ours | theirs))}


def speeds(tokenizers: list[Opened], texts: list[NamedText]) -> list[float]:
    """Return MB of text per CPU second of each tokenizer, chunk after chunk;
    the best of some rounds, taken in turn."""
    chunks = [chunk for text in texts for chunk in text.part(SPEED_BYTES // len(texts))]
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    best_s = [float("inf")] * len(tokenizers)
    for _ in range(SPEED_ROUNDS):
        for i, tokenizer in enumerate(tokenizers):
            started_s = time.process_time()
            for chunk in chunks:
                tokenizer.encode(chunk)
            best_s[i] = min(best_s[i], time.process_time() - started_s)
    return [num_bytes / 1e6 / max(s, 1e-9) for s in best_s]
