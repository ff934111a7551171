"""How many held-out pairs a model ranks right: before the first step and after the last one, and of exports.

A pair is right where the chosen response has the greater log-probability per token: what a model would
rather write, whichever loss it was trained by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_sov.base.chat.encode import TYPE_RESPONSE
from megatron_sov.engine.data.token_shards import Documents, Source
from megatron_sov.post.document_logprobs import document_logprobs
from megatron_sov.train.stages.gate import GateView

MAX_PAIRS = 2048
"""Most held-out pairs of a source that are looked at."""


LogprobsOf = Callable[[Documents, range], np.ndarray]
"""(documents, which of them) -> what `post.document_logprobs.document_logprobs` gives."""


def rank_heldout_pairs(view: GateView, sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """Rank the held-out pairs of a run, and record it; called by all processes together."""
    seq_len, size = view.config.data.max_seq_len(), view.config.train.micro_batch_size
    found = ranked(sources, lambda documents, chosen: document_logprobs(
        view, documents, chosen, seq_len, size), seq_len)
    for name, figures in found.items():
        view.events.write("heldout_pairs", step=view.step, source=name, **figures)
    return found


def ranked(sources: Sequence[Source], logprobs_of: LogprobsOf, seq_len: int) -> dict[str, dict[str, Any]]:
    """Rank the held-out pairs of each source that has some.

    Args:
        sources: preferences.
        logprobs_of: asks the model.
        seq_len: tokens of a document that it is asked for.

    Returns:
        Source -> `pairs`, and `right`, the share of them that is ranked right (a tie is half right).  Pairs
        of which a response begins behind the longest sample are left out.
    """
    found = {}
    for source in sources:
        if source.num_tokens.get("heldout"):
            documents = source.shard("heldout")
            chosen = range(min(len(documents.lengths), 2 * MAX_PAIRS))
            means = _means(documents, chosen, logprobs_of(documents, chosen), seq_len)
            margins = means[0::2] - means[1::2]
            margins = margins[~np.isnan(margins)]
            if len(margins):
                right = float(((margins > 0) + (margins == 0) / 2).mean())
                found[source.name] = {"pairs": len(margins), "right": right}
    return found


def _means(documents: Documents, chosen: range, logprobs: np.ndarray, seq_len: int) -> np.ndarray:
    """Return [documents] float64: mean log-probability of each one's learned tokens as far as `seq_len`
    reaches, NaN where none does."""
    means, at = np.full(len(chosen), np.nan), 0
    for place, document in enumerate(chosen):
        length = int(documents.lengths[document])
        learned = ((documents.types(document, 0, length) == TYPE_RESPONSE)
                   & (documents.loss_weights(document, 0, length) > 0))
        # the first token is no label; those behind the last label of a sample have no number
        learned[:1] = learned[seq_len + 1:] = False
        if learned.any():
            means[place] = logprobs[at:at + length][learned].astype(np.float64).mean()
        at += length
    return means
