"""Loss on held-out documents, which every judge reads alike: the trainer, a checkpoint at any layout,
transformers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.infer.engines.load import Loaded
from megatron_sov.model.config.data import named_shards
from megatron_sov.model.modality import check_encoders
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import PackedRow, heldout_samples
from megatron_sov.train.data.token_bytes import token_bytes
from megatron_sov.train.data.token_shards import TEXTS, Documents, Source, open_sources, tokenizer_folder
from megatron_sov.train.stages.evaluate import (
    PARTS, SUMS, HeldoutEvaluator, HeldoutLoss, heldout_row, result_of)
from megatron_sov.work.progress.progress_bar import create_bar

ROW_TOKENS = 8192
"""Tokens of a row, unless one document alone is longer."""


@dataclass(frozen=True)
class HeldoutData:
    """The held-out splits of token artifacts, cut as `train.stages.evaluate.HeldoutEvaluator` cuts them."""

    sources: list[Source]
    """All sources, with those that hold nothing out."""
    vocab_size: int
    """Token ids of the tokenizer that packed them."""
    seq_len: int
    """Tokens of a row; longer documents are read in overlapping windows of as many."""
    max_tokens: int
    """Tokens of each source that are read at most."""

    def judged(self) -> list[tuple[int, Source]]:
        """Return the sources that hold documents out, with their index."""
        return [(i, s) for i, s in enumerate(self.sources) if s.num_tokens.get("heldout", 0) > 1]

    @cached_property
    def _cut_sources(self) -> dict[int, tuple[Documents, list[OrderedSample]]]:
        """The opened documents of each judged source, and what its rows are made of, by its index."""
        opened = {index: source.shard("heldout") for index, source in self.judged()}
        return {index: (shard, heldout_samples(shard, index, self.seq_len, self.max_tokens))
                for index, shard in opened.items()}

    @property
    def num_rows(self) -> int:
        return sum(len(samples) for _, samples in self._cut_sources.values())

    def rows(self, index: int) -> Iterator[PackedRow]:
        shard, samples = self._cut_sources[index]
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
    sources = open_sources(paths, model_vocab_size, formats, is_fixed=True)
    vocab_size = max(int(read_manifest(named_shards(path)[1], "tokens").content["vocab_size"])
                     for path in paths)
    data = HeldoutData(sources, vocab_size, seq_len, max_tokens)
    if not data.judged():
        raise UserError(f"--data {', '.join(paths)}: holds no documents out, so there is nothing to judge "
                        "by; pack with --heldout 0.02")
    if not any((row.weights > 0).any() for index, _ in data.judged() for row in data.rows(index)):
        raise UserError(f"--data {', '.join(paths)}: none of its held-out tokens is learned (prompts alone), "
                        "so there is nothing to judge by; look at them with `sov-data sample`")
    if model_tokenizer is not None:
        check_same_tokens(tokenizer_folder(sources), model_tokenizer)
    return data


def evaluate_rows(data: HeldoutData, losses_of: Callable[[PackedRow], np.ndarray]) -> dict[str, HeldoutLoss]:
    """Return the result on every source that has held-out targets.

    Args:
        data: the documents.
        losses_of: row of n tokens -> [n] nats, of which those where `row.weights` is positive count.
    """
    results = {}
    sizes = data.bytes_of_token(data.vocab_size)
    with create_bar("judging", data.num_rows, "row") as bar:
        for index, source in data.judged():
            sums = dict.fromkeys(SUMS, 0.0)
            for row in data.rows(index):
                # A weight says here only whether a label counts: losses of held-out text are not weighed.
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


def evaluate_forward_model(loaded: Loaded, data: HeldoutData) -> dict[str, HeldoutLoss]:
    """Return the loss per source of a running policy; called by all processes together."""
    check_encoders(loaded.config.model, data.sources)
    rows = rows_per_batch(loaded, data.seq_len, data.max_tokens)
    sizes = data.bytes_of_token(loaded.config.model.vocab_size)
    evaluator = HeldoutEvaluator(data.sources, sizes, data.seq_len, rows, data.max_tokens, loaded.world)
    shows = loaded.world.rank == loaded.world.size - 1  # of the last pipeline stage, whatever the layout
    with create_bar("judging", evaluator.num_micro_batches, "row", shows) as bar:
        return evaluator.run(loaded.policy, done=bar.update)


def rows_per_batch(loaded: Loaded, seq_len: int, max_tokens: int = ROW_TOKENS) -> int:
    """Return how many rows of `seq_len` tokens are passed through a model at a time."""
    multiple = loaded.config.parallel.row_multiple
    step = multiple // math.gcd(multiple, seq_len)  # so many samples in a row that the layout can cut it
    return -(-max(1, min(ROW_TOKENS, max_tokens) // seq_len) // step) * step


def evaluate_hf(model: Any, data: HeldoutData) -> dict[str, HeldoutLoss]:
    """Return the loss per source of transformers' model on the same targets in the same contexts.

    Raises:
        UserError: the data have pictures or sounds, which that model does not read.
    """
    if read := [f"{s.name} ({', '.join(s.banks)})" for s in data.sources if s.banks]:
        raise UserError(f"sources {'; '.join(read)}: transformers' model reads text alone; judge the "
                        "checkpoint itself, or data of text")
    return evaluate_rows(data, lambda row: row_losses(model, row))


@torch.no_grad()
def row_losses(model: Any, row: PackedRow) -> np.ndarray:
    """Return [n] nats; each segment stands in a line of its own, so that documents do not see one another.

    Lines are padded at their end, which no token before can see.
    """
    lengths = np.diff(row.bounds)
    inside = np.arange(lengths.max()) < lengths[:, None]
    # transformers has no packed rows: a document of its own line sees no other.
    lines = np.zeros(inside.shape, np.int64)
    lines[inside] = row.tokens
    logits = model(input_ids=torch.from_numpy(lines).to(model.device),
                   use_cache=False).logits[torch.from_numpy(inside)]
    labels = torch.from_numpy(row.labels).to(model.device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()


def rows_of(lengths: Sequence[int], row_tokens: int = ROW_TOKENS) -> list[list[int]]:
    """Return the documents (by index, in order) of each row; a row ends where the next
    document would not fit."""
    rows: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not rows or filled + length > row_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += length
    return rows
