"""Compute held-out loss, equally for the trainer, checkpoints at any layout, and transformers."""

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
from megatron_sov.infer.engines.load import LoadedModel
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.modality import check_encoders
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.rows import PackedRow, build_heldout_samples
from megatron_sov.train.data.sources import TEXTS, Source, open_sources, tokenizer_folder
from megatron_sov.train.data.token_bytes import count_token_bytes
from megatron_sov.train.data.token_shards import Documents
from megatron_sov.train.objectives.heldout_evaluator import (
    PARTS, SUMS, HeldoutEvaluator, HeldoutLoss, build_heldout_row, compute_heldout_loss)
from megatron_sov.work.progress.progress_bar import create_bar

ROW_TOKENS = 8192
"""Tokens per row; longer if a single document is longer."""


@dataclass(frozen=True)
class HeldoutData:
    """Held-out splits in token artifacts, cut into rows as by `HeldoutEvaluator`."""

    sources: list[Source]
    """Data sources, with or without held-out split."""
    vocab_size: int
    """`vocab_size` of the tokenizer that packed the data."""
    seq_len: int
    """Tokens per row; longer documents are read in overlapping windows."""
    max_tokens: int
    """Maximum tokens per source."""

    def list_heldout_sources(self) -> list[tuple[int, Source]]:
        """Return (index, source) for sources with held-out documents."""
        return [(i, s) for i, s in enumerate(self.sources) if s.num_tokens.get("heldout", 0) > 1]

    @cached_property
    def _cut_sources(self) -> dict[int, tuple[Documents, list[OrderedSample]]]:
        """Source index -> (`Documents`, `OrderedSample` per row)."""
        opened = {index: source.open_split("heldout") for index, source in self.list_heldout_sources()}
        return {index: (shard, build_heldout_samples(shard, index, self.seq_len, self.max_tokens))
                for index, shard in opened.items()}

    @property
    def num_rows(self) -> int:
        return sum(len(samples) for _, samples in self._cut_sources.values())

    def rows(self, index: int) -> Iterator[PackedRow]:
        shard, samples = self._cut_sources[index]
        for sample in samples:
            yield build_heldout_row(sample, shard, self.sources[index], self.seq_len)

    def bytes_of_token(self, vocab_size: int) -> np.ndarray | None:
        """Return UTF-8 bytes per token [vocab_size]; None if the data have no tokenizer."""
        folder = tokenizer_folder(self.sources)
        return None if folder is None else count_token_bytes(folder, vocab_size)


def open_heldout(paths: dict[str, float], seq_len: int, max_tokens: int, *,
                 model_vocab_size: int = sys.maxsize, model_tokenizer: Path | None = None,
                 formats: tuple[str, ...] = TEXTS) -> HeldoutData:
    """Open the held-out splits in token artifacts as `HeldoutData`.

    Args:
        paths: folder -> weight; the weights are ignored.
        seq_len: tokens per row.
        max_tokens: limit of tokens per source.
        model_vocab_size: vocabulary size of the model.
        model_tokenizer: tokenizer folder of the model, compared with that of the data.
        formats: accepted data formats.

    Raises:
        UserError: the artifacts differ or do not match the model, or have no held-out documents.
    """
    sources = open_sources(paths, model_vocab_size, formats, is_fixed=True)
    vocab_size = max(int(read_manifest(split_source_name(path)[1], "tokens").content["vocab_size"])
                     for path in paths)
    data = HeldoutData(sources, vocab_size, seq_len, max_tokens)
    heldout_sources = data.list_heldout_sources()
    if not heldout_sources:
        raise UserError(f"--data {', '.join(paths)}: has no held-out documents to evaluate on; "
                        "pack with --heldout 0.02")
    if not any((row.weights > 0).any() for index, _ in heldout_sources for row in data.rows(index)):
        raise UserError(f"--data {', '.join(paths)}: all held-out tokens have loss weight 0 (prompts only), "
                        "so there is no loss to compute; look at them with `sov-data sample`")
    if model_tokenizer is not None:
        check_same_tokens(tokenizer_folder(sources), model_tokenizer)
    return data


def evaluate_rows(data: HeldoutData,
                  compute_losses: Callable[[PackedRow], np.ndarray]) -> dict[str, HeldoutLoss]:
    """Return source name -> loss, for sources with held-out targets.

    Args:
        data: held-out documents.
        compute_losses: row of n tokens -> losses [n] in nats; those with `row.weights` > 0 count.
    """
    results = {}
    sizes = data.bytes_of_token(data.vocab_size)
    with create_bar("judging", data.num_rows, "row") as bar:
        for index, source in data.list_heldout_sources():
            sums = dict.fromkeys(SUMS, 0.0)
            for row in data.rows(index):
                # Loss weights only select the targets; held-out losses are not weighted.
                is_target, losses = row.weights > 0, compute_losses(row)
                sums["nats"] += float(losses[is_target].sum(dtype=np.float64))
                sums["tokens"] += int(is_target.sum())
                sums["size_bytes"] += int(sizes[row.labels[is_target]].sum()) if sizes is not None else 0
                for part, (column, select) in PARTS.items() if row.columns else ():
                    in_part = is_target & select(row.columns[column])
                    sums[f"{part}_nats"] += float(losses[in_part].sum(dtype=np.float64))
                    sums[f"{part}_tokens"] += int(in_part.sum())
                bar.update()
            if sums["tokens"]:
                results[source.name] = compute_heldout_loss(sums)
    return results


def evaluate_forward_model(loaded: LoadedModel, data: HeldoutData) -> dict[str, HeldoutLoss]:
    """Return source name -> loss for a `ForwardModel` (collective)."""
    check_encoders(loaded.config.model, data.sources)
    rows = compute_rows_per_batch(loaded, data.seq_len, data.max_tokens)
    sizes = data.bytes_of_token(loaded.config.model.vocab_size)
    evaluator = HeldoutEvaluator(data.sources, sizes, data.seq_len, rows, data.max_tokens, loaded.world)
    shows_progress = loaded.world.rank == loaded.world.size - 1  # always on the last pipeline stage
    with create_bar("judging", evaluator.num_micro_batches, "row", shows_progress) as bar:
        return evaluator.run(loaded.policy, on_micro_batch=bar.update)


def compute_rows_per_batch(loaded: LoadedModel, seq_len: int, max_tokens: int = ROW_TOKENS) -> int:
    """Return how many rows with `seq_len` tokens a forward pass reads."""
    multiple = loaded.config.parallel.row_multiple
    step = multiple // math.gcd(multiple, seq_len)  # smallest row count that the layout can split
    return -(-max(1, min(ROW_TOKENS, max_tokens) // seq_len) // step) * step


def evaluate_hf(model: Any, data: HeldoutData) -> dict[str, HeldoutLoss]:
    """Return source name -> loss for a transformers model, on the targets and contexts of
    `evaluate_forward_model`. Raises `UserError`: the data have images or audio, which the transformers model
    does not read."""
    if media_sources := [f"{s.name} ({', '.join(s.banks)})" for s in data.sources if s.banks]:
        raise UserError(f"sources {'; '.join(media_sources)}: the transformers model reads text only; "
                        "evaluate the checkpoint itself, or use text data")
    return evaluate_rows(data, lambda row: compute_row_losses(model, row))


@torch.no_grad()
def compute_row_losses(model: Any, row: PackedRow) -> np.ndarray:
    """Return the losses [n] at a row's targets, in nats (`-log p`).

    Each document is a separate line of the batch, padded at its end, where causal attention ignores padding.
    """
    lengths = np.diff(row.bounds)
    inside = np.arange(lengths.max()) < lengths[:, None]
    # transformers has no packed rows: a line per document keeps documents apart.
    lines = np.zeros(inside.shape, np.int64)
    lines[inside] = row.tokens
    logits = model(input_ids=torch.from_numpy(lines).to(model.device),
                   use_cache=False).logits[torch.from_numpy(inside)]
    labels = torch.from_numpy(row.labels).to(model.device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()


def group_into_rows(lengths: Sequence[int], row_tokens: int = ROW_TOKENS) -> list[list[int]]:
    """Group document indices in order into rows of at most `row_tokens`; a longer document is a row."""
    rows: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not rows or filled + length > row_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += length
    return rows
