"""Held-out documents as every judge reads them: the trainer, transformers and the bigram baseline
see the same pairs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sov.artifacts import read_manifest
from megatron_sov.data.order import Sample
from megatron_sov.data.rows import Row, heldout_samples
from megatron_sov.data.token_bytes import token_bytes
from megatron_sov.data.token_shards import TEXTS, Documents, Source, open_sources, tokenizer_folder
from megatron_sov.data.vocabulary import refuse_other_tokens
from megatron_sov.errors import UserError
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.train.evaluate import PARTS, SUMS, HeldoutLoss, heldout_row, result_of


@dataclass(frozen=True)
class HeldoutData:
    """The held-out splits of token artifacts, cut as `train.evaluate.HeldoutEvaluator` cuts them."""

    sources: list[Source]
    """All sources, with those that hold nothing out."""
    vocab_size: int
    """Token ids of the tokenizer that packed them."""
    seq_len: int
    """Tokens of a row; documents are cut at its end."""
    max_tokens: int
    """Tokens of each source that are read at most."""

    def judged(self) -> list[tuple[int, Source]]:
        """Return the sources that hold documents out, with their index."""
        return [(i, s) for i, s in enumerate(self.sources) if s.num_tokens.get("heldout", 0) > 1]

    @cached_property
    def _cut(self) -> dict[int, tuple[Documents, list[Sample]]]:
        """The opened documents of each judged source, and what its rows are made of, by its index."""
        opened = {index: source.shard("heldout") for index, source in self.judged()}
        return {index: (shard, heldout_samples(shard, index, self.seq_len, self.max_tokens,
                                               whole=self.sources[index].is_chat))
                for index, shard in opened.items()}

    @property
    def num_rows(self) -> int:
        return sum(len(samples) for _, samples in self._cut.values())

    def rows(self, index: int) -> Iterator[Row]:
        shard, samples = self._cut[index]
        for sample in samples:
            yield heldout_row(sample, shard, self.sources[index], self.seq_len)

    def bytes_of_token(self, vocab_size: int) -> np.ndarray | None:
        """Return UTF-8 bytes of each token [vocab_size], or None where no tokenizer travels with the data."""
        folder = tokenizer_folder(self.sources)
        return None if folder is None else token_bytes(folder, vocab_size)


def open_heldout(paths: dict[str, float], seq_len: int, max_tokens: int, *,
                 model_vocab_size: int = sys.maxsize, model_tokenizer: Path | None = None,
                 formats: tuple[str, ...] = TEXTS) -> HeldoutData:
    """Open token artifacts for judging.

    Args:
        paths: folder -> weight (weights do not matter here).
        seq_len: tokens of a row.
        max_tokens: tokens of each source that are read at most.
        model_vocab_size: token ids that the model knows.
        model_tokenizer: folder of the model's tokenizer, compared with the data's where both are there.
        formats: that the data may have.

    Raises:
        UserError: the artifacts do not fit together or the model, or hold nothing out.
    """
    sources = open_sources(paths, model_vocab_size, formats)
    vocab_size = max(int(read_manifest(path, "tokens").content["vocab_size"]) for path in paths)
    data = HeldoutData(sources, vocab_size, seq_len, max_tokens)
    if not data.judged():
        raise UserError(f"--data {', '.join(paths)}: holds no documents out, so there is nothing to judge "
                        "by; pack with --heldout 0.02")
    if not any((row.weights > 0).any() for index, _ in data.judged() for row in data.rows(index)):
        raise UserError(f"--data {', '.join(paths)}: none of its held-out tokens is learned (prompts alone), "
                        "so there is nothing to judge by; look at them with `sov-data sample`")
    if model_tokenizer is not None:
        refuse_other_tokens(tokenizer_folder(sources), model_tokenizer)
    return data


def evaluate_rows(data: HeldoutData, losses_of: Callable[[Row], np.ndarray]) -> dict[str, HeldoutLoss]:
    """Return the result on every source that has held-out targets.

    Args:
        data: the documents.
        losses_of: row of n tokens -> [n] nats, of which those where `row.weights` is positive count.
    """
    results = {}
    sizes = data.bytes_of_token(data.vocab_size)
    with work_bar("judging", data.num_rows, "row") as bar:
        for index, source in data.judged():
            sums = dict.fromkeys(SUMS, 0.0)
            for row in data.rows(index):
                counted, losses = row.weights > 0, losses_of(row)
                sums["nats"] += float(losses[counted].sum(dtype=np.float64))
                sums["tokens"] += int(counted.sum())
                sums["size_bytes"] += int(sizes[row.labels[counted]].sum()) if sizes is not None else 0
                for part, (column, chosen) in PARTS.items() if row.columns else ():
                    of_part = counted & chosen(row.columns[column])
                    sums[f"{part}_nats"] += float(losses[of_part].sum(dtype=np.float64))
                    sums[f"{part}_tokens"] += int(of_part.sum())
                bar.update()
            if sums["tokens"]:
                results[source.name] = result_of(sums)
    return results
