"""Loss on held-out documents, of a checkpoint at any layout and of a Hugging Face folder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from megatron_sov.data.media_shards import check_encoders
from megatron_sov.data.rows import Row
from megatron_sov.errors import UserError
from megatron_sov.eval.filling import ROW_TOKENS
from megatron_sov.eval.heldout import HeldoutData, evaluate_rows
from megatron_sov.generate.load import Loaded
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.train.evaluate import HeldoutEvaluator, HeldoutLoss


def evaluate_forward_model(loaded: Loaded, data: HeldoutData) -> dict[str, HeldoutLoss]:
    """Return the loss per source of a running policy; called by all processes together."""
    check_encoders(loaded.config.model, data.sources)
    rows = rows_per_batch(loaded, data.seq_len, data.max_tokens)
    sizes = data.bytes_of_token(loaded.config.model.vocab_size)
    evaluator = HeldoutEvaluator(data.sources, sizes, data.seq_len, rows, data.max_tokens, loaded.world)
    shows = loaded.world.rank == loaded.world.size - 1  # of the last pipeline stage, whatever the layout
    with work_bar("judging", evaluator.num_micro_batches, "row", shows) as bar:
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
def row_losses(model: Any, row: Row) -> np.ndarray:
    """Return [n] nats; each segment stands in a line of its own, so that documents do not see one another.

    Lines are padded at their end, which no token before can see.
    """
    lengths = np.diff(row.bounds)
    inside = np.arange(lengths.max()) < lengths[:, None]
    lines = np.zeros(inside.shape, np.int64)
    lines[inside] = row.tokens
    logits = model(input_ids=torch.from_numpy(lines).to(model.device),
                   use_cache=False).logits[torch.from_numpy(inside)]
    labels = torch.from_numpy(row.labels).to(model.device)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy()
